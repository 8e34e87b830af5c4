"""Last step of the Job: checks what the others hand over, and publishes it. The manifest goes last and makes it visible.

Stands in the slim image with the repository's credentials. convert ran on somebody's bytes and may have written
anything, so nothing of its output is unpickled, followed or believed: files are looked at without following links, the
figures are judged again, and config.pbtxt is made here from the request.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from perch_exporter.accuracy import judge_accuracy
from perch_exporter.artifact import (
    GOLDEN_KEY,
    PICTURES_KEY,
    Published,
    claimed,
    digest_of,
    model_data_key,
    model_key,
    plan_key,
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
    Parity,
    PlanFigures,
    StepSeconds,
    Summary,
    Target,
    Tooling,
    Verdict,
)
from perch_exporter.handover import built, handed_over, inspect, inspect_golden, proven, rejected
from perch_exporter.model_files import build_model_files
from perch_exporter.parity import Answers, judge, within
from perch_exporter.picture_samples import load_pictures
from perch_exporter.samples import Golden, load_golden
from perch_exporter.store import Store, open_store, repository_credentials
from perch_exporter.timings import publish_timings
from perch_exporter.workspace import FIGURES, GOLDEN, MODEL, MODEL_DATA, PICTURES, PLAN, PLAN_FIGURES, REPORT, Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What was handed over, and passes. Of what is served the figures stand: of the plan, where there is one."""

    golden: Golden
    figures: Figures
    plan: PlanFigures | None = None

    @property
    def parity(self) -> Parity:
        return self.plan.parity if self.plan else self.figures.parity

    @property
    def tooling(self) -> Tooling:
        if self.plan is None:
            return self.figures.tooling
        bound = {"tensorrt": self.plan.tensorrt, "compute_capability": self.plan.compute_capability}
        return self.figures.tooling.model_copy(update=bound)


def publish(request: ExportRequest, workspace: Workspace, environment: Mapping[str, str]) -> Summary:
    started = time.monotonic()
    found = inspect_output(request, workspace)
    log.info("the hand-over is as it should be: %d golden samples, parity %s", found.golden.samples, found.parity.message)

    store = open_store(request.destination, repository_credentials(environment))
    if other := published(store, request.owner, request.artifact_revision):
        log.info("somebody published it meanwhile, nothing to upload")
        return other.summary(request.destination.uri, Outcome.ALREADY_PUBLISHED)
    manifest = _upload(request, workspace, found, build_model_files(request, found.golden), store)
    if found.plan:
        publish_timings(request, workspace, found.plan.compute_capability, environment)
    seconds = StepSeconds(
        fetch=workspace.fetch_seconds(),
        convert=found.figures.seconds,
        prove=found.figures.prove_seconds,
        build=found.plan.seconds if found.plan else None,
        publish=round(time.monotonic() - started, 3),
    )
    return manifest.summary(request.destination.uri, Outcome.PUBLISHED, seconds)


def _upload(request: ExportRequest, workspace: Workspace, found: Found, made: Mapping[str, bytes], store: Store) -> Published:
    """Replaces what an attempt that died may have left: without a manifest nobody has read it."""
    claimed(store, request.owner, request.artifact_revision)  # refuses what somebody else is in the middle of
    left_over = sorted(store.sizes(), key=lambda key: key != Manifest.FILE_NAME)
    if left_over:
        log.info("replacing %d files of an unfinished attempt", len(left_over))
        store.delete(left_over)
    claim = Claim(owner=request.owner, artifact_revision=request.artifact_revision)
    store.write(Claim.FILE_NAME, claim.to_json().encode())

    output = workspace.output
    files = _network(request, workspace) | {GOLDEN_KEY: output / GOLDEN, REPORT: workspace.proof / REPORT}
    if request.preprocessing:
        files[PICTURES_KEY] = output / PICTURES
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
        parity=found.parity,
        tolerance=request.tolerance,
        accuracy=found.figures.accuracy,
        tooling=found.tooling,
    )
    content = manifest.to_bytes()
    store.write(Manifest.FILE_NAME, content)
    digest = digest_of(content)
    log.info("published as %s", digest)
    return Published(manifest, digest)


def _network(request: ExportRequest, workspace: Workspace) -> dict[str, Path]:
    """What Triton's backend reads, by key."""
    if request.conversion.target is Target.TENSOR_RT:
        return {plan_key(request): workspace.plan / PLAN}
    files = {model_key(request): workspace.output / MODEL}
    if (workspace.output / MODEL_DATA).exists():
        files[model_data_key(request)] = workspace.output / MODEL_DATA
    return files


def inspect_output(request: ExportRequest, workspace: Workspace) -> Found:
    """Raises OutputRejected where there is not exactly what a sound convert, a sound prove and a sound build leave behind."""
    inspect(workspace.output, handed_over(request), "convert")
    inspect(workspace.proof, proven(), "prove")
    try:
        figures = Figures.from_json((workspace.proof / FIGURES).read_bytes())
    except ValidationError as error:
        raise rejected(f"{FIGURES}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    golden = load_golden(workspace.output / GOLDEN)
    inspect_golden(request, golden)
    if request.preprocessing:
        load_pictures(workspace.output / PICTURES, golden.samples)
    _judge_again(figures, golden, request)
    return Found(golden, figures, _inspect_plan(request, workspace))


def _inspect_plan(request: ExportRequest, workspace: Workspace) -> PlanFigures | None:
    if request.conversion.target is not Target.TENSOR_RT:
        return None
    inspect(workspace.plan, built(), "build")
    try:
        figures = PlanFigures.from_json((workspace.plan / PLAN_FIGURES).read_bytes())
    except ValidationError as error:
        raise rejected(f"{PLAN_FIGURES}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}", "build") from error
    if figures.tensorrt != request.tensorrt_version:
        raise rejected(f"the plan is TensorRT {figures.tensorrt}'s, and {request.tensorrt_version} was asked for", "build")
    if figures.parity.verdict is not Verdict.PASSED or not within(figures.parity, request.tolerance):
        raise rejected(f"the plan's figures do not pass: {figures.parity.message}", "build")
    return figures


def _judge_again(figures: Figures, golden: Golden, request: ExportRequest) -> None:
    """The figures against the limits, and that the golden samples can tell a right model from a wrong one at all."""
    tolerance = request.tolerance
    provable = judge([Answers(golden.outputs, golden.outputs, "against themselves")], tolerance)
    if provable.verdict is not Verdict.PASSED:
        raise rejected(f"the golden samples prove nothing: {provable.message}")
    if figures.parity.verdict is not Verdict.PASSED or not within(figures.parity, tolerance):
        raise rejected(f"the figures do not pass: {figures.parity.message}")
    _judge_accuracy_again(figures.accuracy, request.verification.accuracy)


def _judge_accuracy_again(found: Accuracy | None, gate: AccuracyGate | None) -> None:
    if (found is None) != (gate is None):
        raise rejected(
            f"accuracy was {'not ' if found is None else ''}measured, and the version does {'' if gate else 'not '}ask"
        )
    if found is None or gate is None:
        return
    again = judge_accuracy(found, gate)
    if again != found:
        raise rejected(f"the accuracy's verdict is not that of its figures: {found.message}")
    if again.verdict is not Verdict.PASSED and gate.on_failure is OnFailure.BLOCK:
        raise rejected(f"the figures do not pass: {again.message}")
