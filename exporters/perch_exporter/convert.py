"""Second step of the Job: checkpoint to ONNX, and the proof that both answer alike. The only step that imports torch.

It runs on bytes that nobody vouches for, so it stands without credentials and without a network, and writes to the
workspace's `output` alone. What it hands over is not trusted either: publish checks it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from perch_exporter.accuracy import Tally, judge_accuracy
from perch_exporter.architectures import build_model, cut
from perch_exporter.checkpoint import load_model, read_state_dict
from perch_exporter.contract import (
    ACCURACY,
    SOURCE,
    Accuracy,
    CheckpointFormat,
    ExportRequest,
    Figures,
    OnFailure,
    Parity,
    Precision,
    Reason,
    TensorSpec,
    Tooling,
    Verdict,
)
from perch_exporter.datasets import open_data_set
from perch_exporter.failure import StepFailed
from perch_exporter.onnx_file import check_onnx, check_signature
from perch_exporter.parity import Answers, judge
from perch_exporter.precision import lower_precision
from perch_exporter.programs import export_script, load_program, load_script
from perch_exporter.samples import Array, Golden, Tensors, fits, make_inputs, sample_count, save_golden
from perch_exporter.user_code import UserCode, opened
from perch_exporter.workspace import FIGURES, GOLDEN, MODEL, Workspace

log = logging.getLogger(__name__)

DEFAULT_OPSET = 18
"""The exporter's own native opset, which every onnxruntime in a Triton of the last years reads."""

_PROTOBUF_LIMIT = 2**31 - 2**20
_OTHER_DYNAMIC = 256
_UNEVEN_BATCH = 3
_ACCURACY_BATCH = 32


Reference = Callable[[Tensors], dict[str, Array]]
"""Answers as the checkpoint does, to any number of samples."""


def convert(request: ExportRequest, workspace: Workspace) -> None:
    """Writes model.onnx, golden.npz and figures.json. Raises StepFailed; nothing usable is left behind then."""
    with opened(workspace.object(SOURCE)) if SOURCE in request.objects() else nullcontext() as code:
        _convert(request, workspace, code)


def _convert(request: ExportRequest, workspace: Workspace, code: UserCode | None) -> None:
    started = time.monotonic()
    workspace.output.mkdir(parents=True, exist_ok=True)
    path = workspace.output / MODEL
    if request.checkpoint.format is CheckpointFormat.ONNX:
        opset, reference = _adopt(request, workspace.checkpoint, path)
        golden = _golden(request, reference)
    else:
        model = _load(request, workspace, code)
        reference = partial(_ask_checkpoint, request, model, code)
        golden = _golden(request, reference)
        opset = request.conversion.opset or DEFAULT_OPSET
        _export(request, model, golden, path, opset)
    save_golden(golden, workspace.output / GOLDEN)
    lower_precision(request.conversion, path, golden.inputs)
    log.info("%d bytes of ONNX, opset %d, %.1f s so far", path.stat().st_size, opset, time.monotonic() - started)

    parity = _prove(request, reference, golden, path)
    log.info("parity %s: %s", parity.verdict, parity.message)
    if parity.verdict is not Verdict.PASSED:
        raise parity_failure(parity, request.conversion.precision)
    accuracy = _measure(request, workspace, reference, path)
    figures = Figures(parity=parity, accuracy=accuracy, tooling=_tooling(opset), seconds=round(time.monotonic() - started, 3))
    (workspace.output / FIGURES).write_text(figures.to_json())


def _adopt(request: ExportRequest, checkpoint: Path, path: Path) -> tuple[int, Reference]:
    """A ready-made ONNX file, as it is: its opset, and its own answers to one sample at a time, which batches must not change."""
    opset = check_onnx(checkpoint)
    shutil.copyfile(checkpoint, path)
    try:
        session = _session(path)
    except Exception as error:
        raise StepFailed(
            Reason.CHECKPOINT_UNREADABLE, f"onnxruntime {onnxruntime.__version__} cannot load it: {error}"
        ) from error
    check_signature(session, request)
    names = [spec.name for spec in request.outputs]

    def reference(inputs: Tensors) -> dict[str, Array]:
        try:
            return ask(session, names, inputs, 1)
        except Exception as error:
            raise StepFailed(Reason.SHAPE_MISMATCH, f"the model does not run on the version's inputs: {error}") from error

    return opset, reference


def _load(request: ExportRequest, workspace: Workspace, code: UserCode | None) -> nn.Module:
    if request.checkpoint.format is CheckpointFormat.TORCH_SCRIPT:
        return load_script(workspace.checkpoint)
    if request.checkpoint.format is CheckpointFormat.TORCH_EXPORT:
        return load_program(workspace.checkpoint, request)
    architecture = request.architecture
    if architecture is None:  # the contract does not let it come to this
        raise ValueError("weights without an architecture")
    weights = read_state_dict(workspace.checkpoint, request.checkpoint.format, request.checkpoint.state_dict_key)
    log.info("read %d tensors from the checkpoint", len(weights))
    if code is None:
        model = load_model(lambda: build_model(architecture, weights.keys()), weights)
    else:
        model = load_model(lambda: code.build(architecture), weights, on_meta=False)
    return model if architecture.layer is None else cut(model, architecture.layer)


def parity_failure(parity: Parity, precision: Precision) -> StepFailed:
    if parity.verdict is Verdict.UNPROVABLE:
        hint = "are these trained weights? A larger verification.parity.relativeTolerance asks for less"
        return StepFailed(Reason.PARITY_UNPROVABLE, f"parity cannot be proven: {parity.message}; {hint}", parity)
    hint = "" if precision is Precision.FP32 else f"; this is {precision}, conversion.precision: FP32 is exact"
    return StepFailed(
        Reason.PARITY_FAILED, f"the exported model does not answer as the checkpoint does: {parity.message}{hint}", parity
    )


def _golden(request: ExportRequest, reference: Reference) -> Golden:
    inputs = make_inputs(request.inputs, request.artifact_revision, sample_count(request.inputs))
    outputs = reference(inputs)
    for spec in request.outputs:
        answered = outputs[spec.name].shape[1:]
        if not fits(answered, spec.shape):
            raise StepFailed(
                Reason.SHAPE_MISMATCH,
                f"the version's outputs say {spec.name} has shape {list(spec.shape)}, the checkpoint answers "
                f"{list(answered)} (both without the batch dimension)",
            )
    return Golden(inputs, outputs)


def _ask_checkpoint(request: ExportRequest, model: nn.Module, code: UserCode | None, inputs: Tensors) -> dict[str, Array]:
    try:
        with torch.inference_mode():
            answer = model(*(torch.from_numpy(inputs[spec.name]) for spec in request.inputs))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise StepFailed(
            Reason.SHAPE_MISMATCH,
            f"{_name(request)} does not take the version's inputs ({shapes}, batch first): "
            f"{type(error).__name__}: {error}{code.line(error) if code else ''}",
        ) from error
    return _name_outputs(request, answer)


def _name_outputs(request: ExportRequest, answer: object) -> dict[str, Array]:
    """In the order of the version's outputs. A None among them, as of heads that serve training only, is none."""
    parts = [part for part in answer if part is not None] if isinstance(answer, tuple | list) else [answer]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(tensors) != len(parts):
        kinds = ", ".join(sorted({type(part).__name__ for part in parts if not isinstance(part, torch.Tensor)}))
        keys = f" with the keys {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        raise StepFailed(
            Reason.SHAPE_MISMATCH,
            f"{_name(request)} answers with a {kinds}{keys}; it must give a tensor, or a tuple of tensors in the order of the "
            "version's outputs",
        )
    if len(tensors) != len(request.outputs):
        raise StepFailed(
            Reason.SHAPE_MISMATCH, f"the version names {len(request.outputs)} outputs and {_name(request)} gives {len(tensors)}"
        )
    return {spec.name: tensor.numpy() for spec, tensor in zip(request.outputs, tensors, strict=True)}


def _export(request: ExportRequest, model: nn.Module, golden: Golden, path: Path, opset: int) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size > _PROTOBUF_LIMIT:
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"the weights take {size:,} bytes; models above 2 GiB in one ONNX file are not supported",
        )
    samples = tuple(torch.from_numpy(golden.inputs[spec.name][:2]) for spec in request.inputs)
    try:
        if isinstance(model, torch.jit.ScriptModule):
            export_script(request, model, samples, path, opset)
            onnx.checker.check_model(path)
            return
        program = torch.onnx.export(
            model,
            samples,
            dynamo=True,
            input_names=[spec.name for spec in request.inputs],
            output_names=[spec.name for spec in request.outputs],
            dynamic_shapes=tuple(_dynamic(spec) for spec in request.inputs),
            opset_version=opset,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("the exporter gave no program")
        for node in program.model.graph.all_nodes():
            # Stack traces with paths of this container: of no use to Triton, and they differ from build to build.
            node.metadata_props.clear()
        program.save(path, external_data=False)
        onnx.checker.check_model(path)
        written = program.model.opset_imports[""]
        if written != opset:
            raise RuntimeError(f"opset {opset} was asked for and {written} written; leave conversion.opset out")
    except Exception as error:
        cause = error.__cause__ or error
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"torch {torch.__version__} cannot export {_name(request)} with the version's inputs: "
            f"{type(cause).__name__}: {cause}",
        ) from error


def _name(request: ExportRequest) -> str:
    return f"architecture {request.architecture}" if request.architecture else f"the {request.checkpoint.format} program"


def _dynamic(spec: TensorSpec) -> dict[int, object]:
    """Which dimensions may have any size. DYNAMIC and not AUTO, which would quietly fix what the model fixes."""
    dimension = torch.export.Dim.DYNAMIC
    return {0: dimension} | {axis: dimension for axis, size in enumerate(spec.shape, start=1) if size == -1}


def _prove(request: ExportRequest, reference: Reference, golden: Golden, path: Path) -> Parity:
    """Asks the file that will be published, at batches of one, of an odd number, and of all samples at once."""
    session = _session(path)
    names = [spec.name for spec in request.outputs]
    cases = []
    for batch in (1, _UNEVEN_BATCH, golden.samples):
        cases.append(_case(session, names, golden, batch, ""))
    if any(-1 in spec.shape for spec in request.inputs):
        count = min(golden.samples, 4)
        inputs = make_inputs(request.inputs, request.artifact_revision, count, _OTHER_DYNAMIC)
        other = Golden(inputs, reference(inputs))
        cases.append(_case(session, names, other, count, f" with dynamic sizes of {_OTHER_DYNAMIC}"))
    return judge(cases, request.tolerance)


def _measure(request: ExportRequest, workspace: Workspace, reference: Reference, path: Path) -> Accuracy | None:
    """Top-1 of checkpoint and artefact on the labelled set, where the version has one. Raises AccuracyFailed."""
    gate = request.verification.accuracy
    if gate is None:
        return None
    first = request.outputs[0].name
    found = open_data_set(workspace.object(ACCURACY), request.inputs, classes=request.outputs[0].shape[0])
    session, tally = _session(path), Tally()
    for inputs, labels in found.batches(_ACCURACY_BATCH):
        tally.add(labels, ask(session, [first], inputs, _ACCURACY_BATCH)[first], reference(inputs)[first])
    accuracy = judge_accuracy(tally, gate)
    log.info("accuracy %s: %s", accuracy.verdict, accuracy.message)
    if accuracy.verdict is not Verdict.PASSED and gate.on_failure is OnFailure.BLOCK:
        raise StepFailed(
            Reason.ACCURACY_FAILED,
            f"{accuracy.message}; a limit of verification.accuracy is missed (onFailure: Warn would publish it nevertheless)",
        )
    return accuracy


def _case(session: onnxruntime.InferenceSession, names: list[str], golden: Golden, batch: int, note: str) -> Answers:
    try:
        actual = ask(session, names, golden.inputs, batch)
    except Exception as error:
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"the exported model does not run in batches of {batch}{note}, so the exporter fixed a size that should be "
            f"dynamic: {error}",
        ) from error
    return Answers(golden.outputs, actual, f"{golden.samples} samples in batches of {batch}{note}")


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ask(session: onnxruntime.InferenceSession, names: list[str], inputs: Tensors, batch: int) -> dict[str, Array]:
    count = len(next(iter(inputs.values())))
    parts = [
        session.run(names, {name: array[start : start + batch] for name, array in inputs.items()})
        for start in range(0, count, batch)
    ]
    return {name: np.concatenate([part[place] for part in parts]) for place, name in enumerate(names)}


def _tooling(opset: int) -> Tooling:
    return Tooling(
        torch=importlib.metadata.version("torch"),
        onnx=importlib.metadata.version("onnx"),
        onnxruntime=importlib.metadata.version("onnxruntime"),
        opset=opset,
    )
