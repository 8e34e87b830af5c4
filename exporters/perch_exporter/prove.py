"""Third step of the Job: does what convert made answer as the checkpoint did, and is it right often enough?

It has a container of its own, since convert runs somebody's code: that may write what it likes, but the figures and the report
are made here, where none of it runs. What convert says of the checkpoint (its answers) has to be taken from it; what the artefact
answers is seen here. Needs onnxruntime, not torch.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
from pydantic import ValidationError

from perch_exporter.accuracy import Classes, Tally, judge_accuracy
from perch_exporter.contract import (
    ACCURACY,
    CALIBRATION,
    Accuracy,
    ExportRequest,
    Figures,
    OnFailure,
    Parity,
    Precision,
    Reason,
    Reference,
    Target,
    Tooling,
    Verdict,
)
from perch_exporter.datasets import MOST_CALIBRATION, open_data_set
from perch_exporter.detections import aligned
from perch_exporter.failure import Judged, StepFailed
from perch_exporter.handover import handed_over, inspect, inspect_golden, rejected
from perch_exporter.onnx_file import GraphFacts, look_at
from perch_exporter.onnx_session import ask, open_session
from perch_exporter.parity import Answers, judge
from perch_exporter.report import ClassRow, Content, Seen, Timing, class_name, render
from perch_exporter.samples import Array, Golden, joined, load_answers, load_golden
from perch_exporter.workspace import ANSWERS, CALIBRATED, FIGURES, GOLDEN, MODEL, OTHER, REFERENCE, REPORT, Workspace

log = logging.getLogger(__name__)

_SMALL_BATCHES = (2, 1)
_BATCH = 32
_CALIBRATED_BATCH = 16
_SEEN = 12


def prove(request: ExportRequest, workspace: Workspace) -> None:
    """Writes report.html, and figures.json where every gate is passed; else raises StepFailed: the report shows why, too."""
    started = time.monotonic()
    inspect(workspace.output, handed_over(request), "convert")
    reference = _reference(workspace.output / REFERENCE)
    golden = load_golden(workspace.output / GOLDEN)
    inspect_golden(request, golden)
    path = workspace.output / MODEL
    graph = look_at(path)
    session = _load(path)

    cases = _ask_all(request, session, golden, workspace)
    parity = judge([case.answers for case in cases], request.tolerance)
    log.info("parity %s: %s", parity.verdict, parity.message)
    failure = None if parity.verdict is Verdict.PASSED else _parity_failure(request, parity)
    measured = _measure(request, session, workspace) if failure is None else None
    if measured is not None:
        failure = _accuracy_failure(request, parity, measured.accuracy)
    figures = Figures(
        parity=parity,
        accuracy=measured.accuracy if measured else None,
        tooling=_tooling(reference, graph),
        seconds=reference.seconds,
        prove_seconds=round(time.monotonic() - started, 3),
    )
    workspace.proof.mkdir(parents=True, exist_ok=True)
    whole = cases[0]
    shown = _side_by_side(request, whole.answers)
    content = Content(
        request=request,
        figures=figures,
        graph=graph,
        checkpoint_bytes=workspace.checkpoint.stat().st_size,
        artifact_bytes=sum(file.stat().st_size for file in workspace.output.glob(f"{MODEL}*")),
        timing=Timing(golden.samples, reference.eager_seconds, whole.seconds),
        answers=[(name, array, shown.actual[name]) for name, array in shown.reference.items()],
        classes=measured.classes if measured else (),
        seen=measured.seen if measured else _furthest(golden, shown),
    )
    (workspace.proof / REPORT).write_text(render(content))
    if failure is not None:
        raise failure
    (workspace.proof / FIGURES).write_text(figures.to_json())


class _Case:
    def __init__(self, answers: Answers, seconds: float) -> None:
        self.answers, self.seconds = answers, seconds


def _reference(path: Path) -> Reference:
    try:
        return Reference.from_json(path.read_bytes())
    except ValidationError as error:
        raise rejected(f"{REFERENCE}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error


def _load(path: Path) -> onnxruntime.InferenceSession:
    try:
        return open_session(path)
    except Exception as error:  # onnxruntime raises whatever the bytes lead it to
        raise StepFailed(
            Reason.EXPORT_FAILED, f"onnxruntime {onnxruntime.__version__} cannot load the export: {error}"
        ) from error


def _ask_all(request: ExportRequest, session: onnxruntime.InferenceSession, golden: Golden, workspace: Workspace) -> list[_Case]:
    """Every sample once, in batches of three sizes; other sizes, where they are dynamic; INT8's calibration set.

    That a batch of another size answers alike is a question of the graph, which each sample settles in whatever batch it stands:
    all of them again would take a VGG longer than its export.
    """
    output = workspace.output
    cases = [_case(request, session, golden, uneven(golden.samples), "")]
    if OTHER in handed_over(request):
        other = load_golden(output / OTHER)
        inspect_golden(request, other)
        sizes = ", ".join(f"{name} of {list(array.shape[1:])}" for name, array in other.inputs.items())
        cases.append(_case(request, session, other, [other.samples], f" with {sizes}"))
    if request.conversion.calibration is not None:
        inputs = open_data_set(workspace.object(CALIBRATION), request).pick(MOST_CALIBRATION).inputs
        calibrated = Golden(inputs, load_answers(output / CALIBRATED))
        batches = [_CALIBRATED_BATCH] * -(-calibrated.samples // _CALIBRATED_BATCH)
        cases.append(_case(request, session, calibrated, batches, " of the calibration set"))
    return cases


def uneven(samples: int) -> list[int]:
    """Batches that hold each sample once: of three different sizes from 6 samples up."""
    first = samples - sum(_SMALL_BATCHES)
    return [first, *_SMALL_BATCHES] if first > 0 else [1] * samples


def _case(
    request: ExportRequest, session: onnxruntime.InferenceSession, golden: Golden, batches: Sequence[int], note: str
) -> _Case:
    names = [spec.name for spec in request.outputs]
    started, ends = time.monotonic(), np.cumsum(batches)
    parts = []
    for batch, end in zip(batches, ends, strict=True):
        part = {name: array[end - batch : end] for name, array in golden.inputs.items()}
        try:
            parts.append(dict(zip(names, session.run(names, part), strict=True)))
        except Exception as error:
            raise StepFailed(
                Reason.EXPORT_FAILED,
                f"the exported model does not run in batches of {batch}{note}, so the exporter fixed a size that should be "
                f"dynamic: {error}",
            ) from error
    seconds = time.monotonic() - started
    sizes = ", ".join(map(str, sorted(set(batches), reverse=True)))
    return _Case(Answers(golden.outputs, joined(parts), f"{golden.samples} samples in batches of {sizes}{note}"), seconds)


def _parity_failure(request: ExportRequest, parity: Parity) -> StepFailed:
    judged, precision = Judged(parity, request.tolerance), request.conversion.precision
    if parity.verdict is Verdict.UNPROVABLE:
        return StepFailed(
            Reason.PARITY_UNPROVABLE, f"parity cannot be proven: {parity.message}. Are these trained weights?", judged
        )
    hint = "" if precision is Precision.FP32 else f"; this is {precision}, conversion.precision: FP32 is exact"
    return StepFailed(
        Reason.PARITY_FAILED, f"the exported model does not answer as the checkpoint does: {parity.message}{hint}", judged
    )


class _Measured:
    def __init__(self, accuracy: Accuracy, classes: list[ClassRow], seen: list[Seen]) -> None:
        self.accuracy, self.classes, self.seen = accuracy, classes, seen


def _measure(request: ExportRequest, session: onnxruntime.InferenceSession, workspace: Workspace) -> _Measured | None:
    """Top-1 on the labelled set, where the version has one."""
    gate = request.verification.accuracy
    if gate is None:
        return None
    first, classes = request.outputs[0].name, request.outputs[0].shape[0]
    found = open_data_set(workspace.object(ACCURACY), request, labelled=True)
    told = _first_answers(workspace.output / ANSWERS, found.samples)
    tally, worst = Tally(classes), _Worst(request)
    for inputs, labels in found.batches(_BATCH):
        answers = ask(session, [first], inputs, _BATCH)[first]
        worst.note(next(iter(inputs.values())), labels, answers, tally.samples)
        tally.add(labels, answers.argmax(axis=1), told[tally.samples : tally.samples + len(labels)])
    accuracy = judge_accuracy(tally, gate)
    log.info("accuracy %s: %s", accuracy.verdict, accuracy.message)
    rows = [
        ClassRow(class_name(request, number), int(samples), int(right))
        for number, (samples, right) in enumerate(zip(tally.of_class, tally.correct_of_class, strict=True))
        if samples
    ]
    return _Measured(accuracy, sorted(rows, key=lambda row: row.recall), worst.seen())


def _accuracy_failure(request: ExportRequest, parity: Parity, accuracy: Accuracy) -> StepFailed | None:
    gate = request.verification.accuracy
    if accuracy.verdict is Verdict.PASSED or gate is None or gate.on_failure is OnFailure.WARN:
        return None
    pairs = ", ".join(f"{pair.label} for {pair.predicted} ({pair.count} times)" for pair in accuracy.confused[:3])
    taken = f"; most often it takes {pairs}" if pairs else ""
    whose = ", of the ONNX file that the plan would be built of" if request.conversion.target is Target.TENSOR_RT else ""
    return StepFailed(
        Reason.ACCURACY_FAILED,
        f"{accuracy.message}{whose}{taken}. A limit of verification.accuracy is missed; onFailure: Warn would publish it "
        "nevertheless",
        Judged(parity, request.tolerance, accuracy),
    )


def _first_answers(path: Path, samples: int) -> Classes:
    """The checkpoint's first answer to each sample, int64 [samples], as convert wrote them."""
    try:
        told = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise rejected(f"{ANSWERS} cannot be read: {error}") from error
    if not isinstance(told, np.ndarray) or told.dtype != np.int64 or told.shape != (samples,):
        raise rejected(f"{ANSWERS} does not hold one int64 for each of {samples} samples")
    return told


class _Worst:
    """Samples that the artefact is most sure of, and wrong about."""

    def __init__(self, request: ExportRequest) -> None:
        self._request = request
        self._found: list[tuple[float, int, Seen]] = []

    def note(self, samples: Array, labels: Classes, answers: Array, before: int) -> None:
        told = answers.argmax(axis=1)
        rows = np.arange(len(labels))
        margins = answers[rows, told] - answers[rows, labels]
        for row in np.flatnonzero(told != labels):
            is_one, taken_for = (class_name(self._request, int(numbers[row])) for numbers in (labels, told))
            caption = f"sample {before + row}: {is_one}, taken for {taken_for}"
            self._found.append((float(margins[row]), before + int(row), Seen(samples[row], caption)))
        self._found = sorted(self._found, key=lambda entry: (-entry[0], entry[1]))[:_SEEN]

    def seen(self) -> list[Seen]:
        return [seen for _, _, seen in self._found]


def _side_by_side(request: ExportRequest, answers: Answers) -> Answers:
    """Answers that can be shown element by element: of one kind, and detections in their partners' places."""
    ours, theirs = answers.reference, answers.actual
    alike = [name for name in ours if (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype)]
    overlap = request.tolerance.minimum_iou
    if overlap is not None and len(alike) == len(ours):
        return replace(answers, actual=aligned(ours, theirs, float(overlap)))
    return replace(answers, reference={name: ours[name] for name in alike}, actual={name: theirs[name] for name in alike})


def _furthest(golden: Golden, answers: Answers) -> list[Seen]:
    """The golden samples with the largest differences."""
    if not answers.reference:
        return []
    name, reference = next(iter(answers.reference.items()))
    apart = np.abs(answers.actual[name].astype(np.float64) - reference).reshape(golden.samples, -1).max(axis=1, initial=0)
    samples = next(iter(golden.inputs.values()))
    order = np.argsort(-apart, kind="stable")[:6]
    return [Seen(samples[row], f"golden sample {row}: {name} differs by {apart[row]:.2g}") for row in order]


def _tooling(reference: Reference, graph: GraphFacts) -> Tooling:
    return Tooling(
        torch=reference.torch,
        onnx=importlib.metadata.version("onnx"),
        onnxruntime=importlib.metadata.version("onnxruntime"),
        opset=graph.opset,
    )
