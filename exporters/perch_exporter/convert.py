"""Second step of the Job: checkpoint to ONNX, and the checkpoint's answers to the samples. The only step that imports torch.

It runs on bytes that nobody vouches for, so it stands without credentials and without a network, and writes to the
workspace's `output` alone. What it hands over is not trusted either: prove asks the artefact itself, and publish checks both.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import torch
from torch import nn

from perch_exporter.accuracy import Classes
from perch_exporter.architectures import TORCHVISION, build_model, cut
from perch_exporter.checkpoint import load_model, read_state_dict
from perch_exporter.contract import (
    ACCURACY,
    CALIBRATION,
    SAMPLES,
    SOURCE,
    CheckpointFormat,
    ExportRequest,
    Reason,
    Reference,
    TensorSpec,
)
from perch_exporter.datasets import FEWEST_CALIBRATION, FEWEST_SAMPLES, MOST_CALIBRATION, Picked, open_data_set
from perch_exporter.failure import StepFailed
from perch_exporter.handover import has_dynamic_sizes
from perch_exporter.onnx_file import check_onnx, check_signature, lowest_opset, name_ends, write_model
from perch_exporter.onnx_session import ask, open_session
from perch_exporter.parity import spread
from perch_exporter.picture_samples import make_pictures, prepare_pictures, save_pictures
from perch_exporter.precision import lower_precision
from perch_exporter.programs import export_script, load_program, load_script
from perch_exporter.samples import (
    Array,
    Golden,
    Tensors,
    data_type_of,
    fits,
    in_batches,
    make_inputs,
    sample_count,
    save_golden,
    surest,
)
from perch_exporter.user_code import UserCode, opened
from perch_exporter.workspace import ANSWERS, CALIBRATED, GOLDEN, MODEL, OTHER, PICTURES, REFERENCE, Workspace

log = logging.getLogger(__name__)

DEFAULT_OPSET = 18
"""The exporter's own native opset, which every onnxruntime in a Triton of the last years reads."""

_PROTOBUF_LIMIT = 2**31 - 2**20
"""Most bytes of weights that the exporter for TorchScript writes: it knows one file only, and no protobuf has 2 GiB."""

_SIZES = (224, 256, 280, 240, 288, 384, 448, 512, 192, 128, 64, 32, 16, 8)
"""For dimensions of any size: the first that the network takes, and the next. Some take multiples of 14, of 48 or of 64 alone."""
_REFERENCE_BATCH = 16


Ask = Callable[[Tensors], dict[str, Array]]
"""Answers as the checkpoint does, to any number of samples."""


def convert(request: ExportRequest, workspace: Workspace) -> None:
    """Writes the files of `handover.handed_over`. Raises StepFailed; nothing usable is left behind then."""
    if request.architecture and str(request.architecture.name).startswith(TORCHVISION):
        import torchvision.models  # noqa: F401  # before the clock runs: the seconds that are told are those after imports
    with opened(workspace.object(SOURCE)) if SOURCE in request.objects() else nullcontext() as code:
        _convert(request, workspace, code)


def _convert(request: ExportRequest, workspace: Workspace, code: UserCode | None) -> None:
    started = time.monotonic()
    workspace.output.mkdir(parents=True, exist_ok=True)
    path = workspace.output / MODEL
    if request.checkpoint.format is CheckpointFormat.ONNX:
        reference = _adopt(request, workspace.checkpoint, path)
        sizes = _sizes(request, reference)
        count = sample_count(request.inputs, dynamic=sizes[0])
        golden, calibration, eager_seconds = _samples(request, workspace, reference, count, sizes[0])
    else:
        model = _load(request, workspace, code)
        asked, exported = _forms(request, model)
        reference = partial(_ask_checkpoint, request, asked, code)
        sizes = _sizes(request, reference)
        count = sample_count(request.inputs, _operations(request, reference, sizes[0]), sizes[0])
        golden, calibration, eager_seconds = _samples(request, workspace, reference, count, sizes[0])
        _export(request, exported, golden, path)
    save_golden(golden, workspace.output / GOLDEN)
    if calibration is not None:
        what = f"the answers to {calibration.samples} samples of conversion.calibration (a set of fewer has less)"
        save_golden(Golden({}, calibration.outputs), workspace.output / CALIBRATED, what)
    lower_precision(request.conversion, path, (calibration or golden).inputs, for_tensorrt=request.for_tensorrt)
    if has_dynamic_sizes(request):
        inputs = make_inputs(request.inputs, request.artifact_revision, min(golden.samples, 4), sizes[1])
        save_golden(Golden(inputs, reference(inputs)), workspace.output / OTHER)
    if request.verification.accuracy is not None:
        np.save(workspace.output / ANSWERS, _first_answers(request, workspace, reference), allow_pickle=False)
    found = Reference(
        torch=torch.__version__, seconds=round(time.monotonic() - started, 3), eager_seconds=round(eager_seconds, 6)
    )
    (workspace.output / REFERENCE).write_text(found.to_json())
    log.info("%d bytes of ONNX after %.1f s", sum(file.stat().st_size for file in path.parent.glob(f"{MODEL}*")), found.seconds)


def _first_answers(request: ExportRequest, workspace: Workspace, reference: Ask) -> Classes:
    first = request.outputs[0].name
    found = open_data_set(workspace.object(ACCURACY), request, labelled=True)
    return np.concatenate([reference(inputs)[first].argmax(axis=1) for inputs, _ in found.batches(_REFERENCE_BATCH)])


def _adopt(request: ExportRequest, checkpoint: Path, path: Path) -> Ask:
    """A ready-made ONNX file, as it is: its own answers to one sample at a time, which batches must not change."""
    check_onnx(checkpoint)
    shutil.copyfile(checkpoint, path)
    try:
        session = open_session(path)
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

    return reference


def _load(request: ExportRequest, workspace: Workspace, code: UserCode | None) -> nn.Module:
    if request.checkpoint.format is CheckpointFormat.TORCH_SCRIPT:
        return load_script(workspace.checkpoint)
    if request.checkpoint.format is CheckpointFormat.TORCH_EXPORT:
        return load_program(workspace.checkpoint, request)
    architecture = request.architecture
    if architecture is None:  # the contract does not let it come to this
        raise ValueError("weights without an architecture")
    given = request.checkpoint
    weights = read_state_dict(workspace.checkpoint, given.format, given.state_dict_key, given.trust_source)
    log.info("read %d tensors from the checkpoint", len(weights))
    if request.detects:
        from perch_exporter.detectors import build_detector

        # Its anchors are made when it is, and are no weights: on torch's meta device they would be lost.
        model = load_model(lambda: build_detector(architecture, weights), weights, on_meta=False)
    elif code is None:
        model = load_model(lambda: build_model(architecture, weights.keys()), weights)
    else:
        model = load_model(lambda: code.build(architecture), weights, on_meta=False)
    return model if architecture.layer is None else cut(model, architecture.layer)


def _forms(request: ExportRequest, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What is asked, and what is exported: one and the same, except for detection models."""
    if not request.detects:
        return model, model
    from perch_exporter.detectors import BatchedDetector, Detector

    channels, height, width = request.inputs[0].shape
    return Detector(model), BatchedDetector(model, (channels, height, width)).eval()


def _translations(request: ExportRequest) -> dict[Callable[..., Any], Callable[..., Any]] | None:
    if not request.detects:
        return None
    from perch_exporter.detectors import TRANSLATIONS

    return dict(TRANSLATIONS)


def _sizes(request: ExportRequest, reference: Ask) -> tuple[int, int]:
    """Two that the network takes for every dimension of any size: what holds at one alone may be fixed in the export."""
    if not has_dynamic_sizes(request):
        return _SIZES[0], _SIZES[1]
    taken: list[int] = []
    refused: list[StepFailed] = []
    for size in _SIZES:
        try:
            reference(make_inputs(request.inputs, request.artifact_revision, 1, size))
        except StepFailed as error:
            refused.append(error)
        else:
            taken.append(size)
        if len(taken) == 2:
            return taken[0], taken[1]
    raise StepFailed(
        refused[0].reason,
        f"{refused[0].message}. For all dimensions of -1 these sizes are tried in turn: {', '.join(map(str, _SIZES))}; "
        f"it takes {taken[0] if taken else 'none'} of them, and two are needed to prove an export for any size: state the sizes "
        "that clients send in inputs[].shape",
    )


def _operations(request: ExportRequest, reference: Ask, size: int = _SIZES[0]) -> int:
    """Multiplications and additions for one sample, counted while the checkpoint answers to one."""
    # It warns, as soon as it is imported, that it counts no kernels of the Triton language: there are none here.
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode

    one = make_inputs(request.inputs, request.artifact_revision, 1, size)
    # What it does not take is told when it is asked all samples.
    with suppress(StepFailed), FlopCounterMode(display=False) as counter:
        reference(one)
    return int(counter.get_total_flops())


def _samples(
    request: ExportRequest, workspace: Workspace, reference: Ask, count: int, size: int
) -> tuple[Golden, Golden | None, float]:
    """The golden samples, for INT8 the calibration set, and the seconds that the checkpoint took for the former.

    The golden samples are real ones where a data set is named. Those of INT8 come from its calibration set, and are the ones of
    which the checkpoint is surest: INT8 holds the numbers that it was calibrated for, and made-up inputs far from them would fail
    a sound artefact.
    """
    data = next((name for name in (CALIBRATION, SAMPLES, ACCURACY) if name in request.objects()), None)
    picked = _made(request, count, size)
    if data is not None:
        there = open_data_set(workspace.object(data), request)
        if there.samples < FEWEST_SAMPLES:
            raise StepFailed(
                Reason.DATASET_UNREADABLE,
                f"{data} has {there.samples} samples, and {FEWEST_SAMPLES} are the fewest whose answers can be compared",
            )
        if data == CALIBRATION and there.samples < FEWEST_CALIBRATION:
            raise StepFailed(
                Reason.DATASET_UNREADABLE,
                f"conversion.calibration has {there.samples} samples, and {FEWEST_CALIBRATION} are the fewest that tell a range; "
                f"some hundred are better, of which {MOST_CALIBRATION} are used",
            )
        real = there.pick(MOST_CALIBRATION if data == CALIBRATION else count)
        # What is replayed to an ensemble are pictures; of arrays nobody knows the pictures.
        if request.preprocessing is None or real.pictures:
            picked = real
        elif data == CALIBRATION:
            raise StepFailed(
                Reason.DATASET_UNREADABLE,
                "conversion.calibration holds arrays; with preprocessing INT8 is proven on pictures: give a zip or tar of them",
            )
    answered, seconds = _answered(request, picked.inputs, reference)
    _check_steady(request, answered, reference)
    chosen = np.arange(answered.samples)
    if data == CALIBRATION:
        scores = next((array for array in answered.outputs.values() if array.ndim == 2 and array.shape[1] > 1), None)
        chosen = np.arange(count) * answered.samples // count if scores is None else surest(scores, count)
    if picked.pictures:
        save_pictures([picked.pictures[place] for place in chosen], workspace.output / PICTURES)
    golden = Golden(_rows(answered.inputs, chosen), _rows(answered.outputs, chosen))
    return golden, answered if data == CALIBRATION else None, seconds * len(chosen) / answered.samples


def _check_steady(request: ExportRequest, answered: Golden, reference: Ask) -> None:
    """Two samples are asked again by themselves: where a network answers itself otherwise, no export of it would pass, and
    parity could not tell why."""
    if request.detects:
        return
    few = _rows(answered.inputs, np.arange(min(2, answered.samples)))
    alone = reference(few)
    for name, whole in answered.outputs.items():
        moved = _apart(alone[name], whole[: len(alone[name])])
        bound = max(request.tolerance.relative * spread(whole), 1e-5 * _size(whole))
        if moved > bound:
            again = _apart(reference(few)[name], alone[name])
            raise StepFailed(Reason.PARITY_FAILED, f"{_name(request)} {_unsteady(name, moved, again if again > bound else None)}")


def _unsteady(name: str, moved: float, again: float | None) -> str:
    """`again`: how far two answers to the very same lie apart."""
    if again is not None:
        return (
            f"answers the same samples differently when it is asked twice ({name} by {again:.2g}): something in forward() is "
            "random, such as functional dropout without training=self.training. Make the answer depend on the input alone"
        )
    return (
        f"answers a sample differently beside other samples ({name} by {moved:.2g}): forward() computes something over the "
        "batch, such as a softmax over dim 0, and Triton's batches hold anybody's requests: compute each sample by itself"
    )


def _apart(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return 0.0  # told where shapes are compared
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0))


def _size(answers: Array) -> float:
    return float(np.abs(answers.astype(np.float64)).max(initial=0.0))


def _made(request: ExportRequest, count: int, size: int) -> Picked:
    if request.preprocessing is None:
        return Picked(make_inputs(request.inputs, request.artifact_revision, count, size))
    pictures = make_pictures(request.preprocessing, request.inputs[0], request.artifact_revision, count)
    return Picked(prepare_pictures(pictures, request.preprocessing, request.inputs[0]), tuple(pictures))


def _rows(arrays: Tensors, chosen: npt.NDArray[np.intp]) -> dict[str, Array]:
    return {name: array[chosen] for name, array in arrays.items()}


def _answered(request: ExportRequest, inputs: Tensors, reference: Ask) -> tuple[Golden, float]:
    """With the checkpoint's answers, in batches of at most _REFERENCE_BATCH, and the seconds that they took."""
    started = time.monotonic()
    outputs = in_batches(reference, inputs, _REFERENCE_BATCH)
    seconds = time.monotonic() - started
    for spec in request.outputs:
        answered, data_type = outputs[spec.name].shape[1:], data_type_of(outputs[spec.name])
        if data_type is not spec.data_type:
            raise StepFailed(
                Reason.SHAPE_MISMATCH,
                f"the version's outputs say {spec.name} is {spec.data_type}, the checkpoint answers {data_type}",
            )
        if not fits(answered, spec.shape):
            raise StepFailed(
                Reason.SHAPE_MISMATCH,
                f"the version's outputs say {spec.name} has shape {list(spec.shape)}, the checkpoint answers "
                f"{list(answered)} (both without the batch dimension)",
            )
    return Golden(inputs, outputs), seconds


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
    for spec, tensor in zip(request.outputs, tensors, strict=True):
        if tensor.dtype is torch.bfloat16 or tensor.layout is not torch.strided:
            kind = f"{str(tensor.layout).removeprefix('torch.')} tensor of {str(tensor.dtype).removeprefix('torch.')}"
            raise StepFailed(
                Reason.SHAPE_MISMATCH,
                f"{_name(request)} gives output {spec.name} as a {kind}: it must give a dense one of the output's dataType",
            )
    return {spec.name: tensor.numpy() for spec, tensor in zip(request.outputs, tensors, strict=True)}


def _export(request: ExportRequest, model: nn.Module, golden: Golden, path: Path) -> None:
    opset = request.conversion.opset or DEFAULT_OPSET
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size > _PROTOBUF_LIMIT and isinstance(model, torch.jit.ScriptModule):
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"the weights take {size:,} bytes; above 2 GiB TorchScript is not exported: save the state dict, or use torch.export",
        )
    samples = tuple(torch.from_numpy(golden.inputs[spec.name][:2]) for spec in request.inputs)
    try:
        if isinstance(model, torch.jit.ScriptModule):
            export_script(request, model, samples, path, opset)
            return
        exported = _graph(request, model, samples, opset)
        needed, operator = lowest_opset(exported)
        if needed > opset:
            if request.conversion.opset is not None:
                raise RuntimeError(
                    f"{operator} came with opset {needed}; leave conversion.opset out, or let it be {needed} or more"
                )
            log.info("%s came with opset %d, which is written", operator, needed)
            exported = _graph(request, model, samples, needed)
        name_ends(exported, [spec.name for spec in request.inputs], [spec.name for spec in request.outputs])
        write_model(exported, path)
    except Exception as error:
        cause = error.__cause__ or error
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"torch {torch.__version__} cannot export {_name(request)} with the version's inputs: "
            f"{type(cause).__name__}: {cause}",
        ) from error


def _graph(request: ExportRequest, model: nn.Module, samples: tuple[torch.Tensor, ...], opset: int) -> onnx_ir.Model:
    program = torch.onnx.export(
        model,
        samples,
        dynamo=True,
        dynamic_shapes=tuple(_dynamic(spec) for spec in request.inputs),
        opset_version=opset,
        custom_translation_table=_translations(request),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("the exporter gave no program")
    written = program.model.opset_imports[""]
    if written != opset:
        raise RuntimeError(f"opset {opset} was asked for and {written} written; leave conversion.opset out")
    for node in program.model.graph.all_nodes():
        # Stack traces with paths of this container: of no use to Triton, and they differ from build to build.
        node.metadata_props.clear()
    return program.model


def _name(request: ExportRequest) -> str:
    return f"architecture {request.architecture}" if request.architecture else f"the {request.checkpoint.format} program"


def _dynamic(spec: TensorSpec) -> dict[int, object]:
    """Which dimensions may have any size. DYNAMIC and not AUTO, which would quietly fix what the model fixes."""
    dimension = torch.export.Dim.DYNAMIC
    return {0: dimension} | {axis: dimension for axis, size in enumerate(spec.shape, start=1) if size == -1}
