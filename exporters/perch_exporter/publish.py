"""Third step of the Job: checks what convert hands over, and publishes it. The manifest goes last and makes it visible.

Stands in the slim image with the repository's credentials. convert ran on somebody's bytes and may have written
anything, so nothing of its output is unpickled, followed or believed: files are looked at without following links, the
figures are judged again, and config.pbtxt is made here from the request.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from perch_exporter.accuracy import judge_accuracy
from perch_exporter.artifact import (
    GOLDEN_KEY,
    Published,
    claimed,
    digest_of,
    model_key,
    published,
    sha256_of,
)
from perch_exporter.contract import (
    Accuracy,
    AccuracyGate,
    Claim,
    ExportRequest,
    Figures,
    FileEntry,
    Manifest,
    OnFailure,
    Outcome,
    Reason,
    StepSeconds,
    Summary,
    TensorSpec,
    Verdict,
)
from perch_exporter.failure import StepFailed
from perch_exporter.model_files import build_model_files
from perch_exporter.parity import Answers, judge, within
from perch_exporter.samples import GOLDEN_LIMIT, Golden, Tensors, fits, load_golden
from perch_exporter.store import Store, open_store, repository_credentials
from perch_exporter.workspace import FIGURES, GOLDEN, MODEL, Workspace

log = logging.getLogger(__name__)

_LIMITS = {MODEL: 2**31, GOLDEN: GOLDEN_LIMIT, FIGURES: 64 * 1024}
_MOST_SAMPLES = 64


def publish(request: ExportRequest, workspace: Workspace, environment: Mapping[str, str]) -> Summary:
    if done := workspace.published():
        log.info("already published, nothing to upload")
        return done
    started = time.monotonic()
    figures, golden = inspect_output(request, workspace.output)
    log.info("the hand-over is as it should be: %d golden samples, parity %s", golden.samples, figures.parity.message)

    store = open_store(request.destination, repository_credentials(environment))
    if found := published(store, request.owner, request.artifact_revision):
        log.info("somebody published it meanwhile, nothing to upload")
        return found.summary(request.destination.uri, Outcome.ALREADY_PUBLISHED)
    manifest = _upload(request, workspace.output, figures, build_model_files(request, golden), store)
    seconds = StepSeconds(fetch=workspace.fetch_seconds(), convert=figures.seconds, publish=round(time.monotonic() - started, 3))
    return manifest.summary(request.destination.uri, Outcome.PUBLISHED, seconds)


def _upload(request: ExportRequest, output: Path, figures: Figures, made: Mapping[str, bytes], store: Store) -> Published:
    """Replaces what an attempt that died may have left: without a manifest nobody has read it."""
    claimed(store, request.owner, request.artifact_revision)  # refuses what somebody else is in the middle of
    left_over = sorted(store.sizes(), key=lambda key: key != Manifest.FILE_NAME)
    if left_over:
        log.info("replacing %d files of an unfinished attempt", len(left_over))
        store.delete(left_over)
    claim = Claim(owner=request.owner, artifact_revision=request.artifact_revision)
    store.write(Claim.FILE_NAME, claim.to_json().encode())

    files = {model_key(request): output / MODEL, GOLDEN_KEY: output / GOLDEN}
    entries = {key: FileEntry(sha256=sha256_of(path), size=path.stat().st_size) for key, path in files.items()}
    entries |= {key: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)) for key, content in made.items()}
    for key, path in files.items():
        log.info("uploading %s (%d bytes) to %s", key, entries[key].size, store.where(key))
        store.upload(path, key)
    for key, content in made.items():
        store.write(key, content)

    manifest = Manifest(
        owner=request.owner,
        model_name=request.model_name,
        version=request.version,
        artifact_revision=request.artifact_revision,
        checkpoint_sha256=request.checkpoint.sha256,
        files=entries,
        parity=figures.parity,
        tolerance=request.tolerance,
        accuracy=figures.accuracy,
        tooling=figures.tooling,
    )
    content = manifest.to_bytes()
    store.write(Manifest.FILE_NAME, content)
    digest = digest_of(content)
    log.info("published as %s", digest)
    return Published(manifest, digest)


def inspect_output(request: ExportRequest, output: Path) -> tuple[Figures, Golden]:
    """Raises OutputRejected where convert's output is not exactly what a sound convert leaves behind."""
    _inspect_files(output)
    try:
        figures = Figures.from_json((output / FIGURES).read_bytes())
    except ValidationError as error:
        raise _rejected(f"{FIGURES}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    golden = load_golden(output / GOLDEN)
    _inspect_tensors("inputs", request.inputs, golden.inputs, golden.samples)
    _inspect_tensors("outputs", request.outputs, golden.outputs, golden.samples)
    _judge_again(figures, golden, request)
    return figures, golden


def _inspect_files(output: Path) -> None:
    try:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(output)}
    except FileNotFoundError as error:
        raise _rejected(f"{output} is not there; did convert run?") from error
    missing, strange = sorted(_LIMITS.keys() - present), sorted(present.keys() - _LIMITS)
    if missing or strange:
        raise _rejected(f"missing {missing or 'nothing'}, unexpected {[name[:64] for name in strange[:5]] or 'nothing'}")
    for name, status in present.items():
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise _rejected(f"{name} is not a regular file of its own")
        if not 0 < status.st_size <= _LIMITS[name]:
            raise _rejected(f"{name} has {status.st_size:,} bytes, allowed are 1 to {_LIMITS[name]:,}")


def _inspect_tensors(group: str, specs: tuple[TensorSpec, ...], tensors: Tensors, samples: int) -> None:
    if set(tensors) != {spec.name for spec in specs}:
        raise _rejected(f"golden {group} are {sorted(tensors)}, the version's {sorted(spec.name for spec in specs)}")
    if not 2 <= samples <= _MOST_SAMPLES:
        raise _rejected(f"{samples} golden samples, allowed are 2 to {_MOST_SAMPLES}")
    for spec in specs:
        shape = tensors[spec.name].shape
        stated = (samples, *spec.shape)
        if not fits(shape, stated):
            raise _rejected(f"golden {spec.name} has shape {list(shape)}, the version's is {list(stated)}")


def _judge_again(figures: Figures, golden: Golden, request: ExportRequest) -> None:
    """The figures against the limits, and that the golden samples can tell a right model from a wrong one at all."""
    tolerance = request.tolerance
    provable = judge([Answers(golden.outputs, golden.outputs, "against themselves")], tolerance)
    if provable.verdict is not Verdict.PASSED:
        raise _rejected(f"the golden samples prove nothing: {provable.message}")
    if figures.parity.verdict is not Verdict.PASSED or not within(figures.parity, tolerance):
        raise _rejected(f"the figures do not pass: {figures.parity.message}")
    _judge_accuracy_again(figures.accuracy, request.verification.accuracy)


def _judge_accuracy_again(found: Accuracy | None, gate: AccuracyGate | None) -> None:
    if (found is None) != (gate is None):
        raise _rejected(
            f"accuracy was {'not ' if found is None else ''}measured, and the version does {'' if gate else 'not '}ask"
        )
    if found is None or gate is None:
        return
    again = judge_accuracy(found, gate)
    if again != found:
        raise _rejected(f"the accuracy's verdict is not that of its figures: {found.message}")
    if again.verdict is not Verdict.PASSED and gate.on_failure is OnFailure.BLOCK:
        raise _rejected(f"the figures do not pass: {again.message}")


def _rejected(why: str) -> StepFailed:
    return StepFailed(Reason.OUTPUT_REJECTED, f"what convert handed over is refused: {why}")
