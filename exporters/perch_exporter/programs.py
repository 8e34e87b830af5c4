"""Checkpoints that are whole programs: TorchScript and `torch.export`. Needs torch; runs on bytes that nobody vouches for.

Reading either runs what its author wrote, by torch's own interpreters and readers: in convert's sandbox alone, as user code.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

from perch_exporter.checkpoint import check_unpacked
from perch_exporter.contract import CheckpointFormat, ExportRequest, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.onnx_file import name_ends, write_model

OLD_EXPORTER_OPSETS = range(18, 21)
"""What torch's exporter for TorchScript writes, of those that a request may ask for."""


def load_script(path: Path) -> nn.Module:
    """Raises CheckpointUnreadable."""
    check_unpacked(path, CheckpointFormat.TORCH_SCRIPT)
    try:
        module = torch.jit.load(path, map_location="cpu")
        # A frozen module is one for inference already, and has no such switch.
        return module.eval() if hasattr(module, "training") else module
    except Exception as error:  # torch raises whatever the broken bytes lead it to
        raise _unreadable(CheckpointFormat.TORCH_SCRIPT, "torch.jit.save", error) from error


def load_program(path: Path, request: ExportRequest) -> nn.Module:
    """The program as a module. Raises CheckpointUnreadable, or ShapeMismatch where its batch is fixed."""
    check_unpacked(path, CheckpointFormat.TORCH_EXPORT)
    try:
        program = torch.export.load(path)
        shapes = [tuple(node.meta["val"].shape) for node in _inputs(program)]
        module: nn.Module = program.module()
    except Exception as error:
        raise _unreadable(CheckpointFormat.TORCH_EXPORT, "torch.export.save", error) from error
    if len(shapes) != len(request.inputs):
        raise StepFailed(
            Reason.SHAPE_MISMATCH, f"the version names {len(request.inputs)} inputs and the program takes {len(shapes)} tensors"
        )
    for spec, shape in zip(request.inputs, shapes, strict=True):
        if not shape or isinstance(shape[0], int):
            raise StepFailed(
                Reason.SHAPE_MISMATCH,
                f"the program fixes its batch: input {spec.name} has shape {list(shape)}; export it with a dynamic first "
                "dimension (torch.export.export(model, args, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))",
            )
    return module


def _inputs(program: Any) -> list[Any]:
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(nodes) != len(names):
        raise ValueError("it takes numbers or texts beside tensors, which a server has not")
    return nodes


def export_script(request: ExportRequest, module: nn.Module, samples: tuple[torch.Tensor, ...], path: Path, opset: int) -> None:
    """By the exporter that knows TorchScript itself, control flow and all; the newer one takes Python modules only."""
    if opset not in OLD_EXPORTER_OPSETS:
        raise ValueError(f"opset {opset} is not written for TorchScript; {OLD_EXPORTER_OPSETS.start} to 20 are")
    # The exporter has one space of names with the program's own parameters: what the version says is set afterwards.
    names = [f"perch_input_{place}" for place in range(len(request.inputs))]
    # Outputs are left out: what they may vary in follows from the inputs.
    axes = {
        name: {0: "batch"} | {axis: f"{name}_{axis}" for axis, size in enumerate(spec.shape, start=1) if size == -1}
        for name, spec in zip(names, request.inputs, strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called old, and says so at length
        torch.onnx.export(
            module,
            samples,
            path,
            dynamo=False,
            input_names=names,
            dynamic_axes=axes,
            opset_version=opset,
        )
    model = onnx.load(path)
    for node in model.graph.node:
        node.doc_string = ""  # lines of the program's author
    named = onnx_ir.from_proto(model)
    there = {value.name for value in named.graph.inputs}
    if unused := [spec.name for name, spec in zip(names, request.inputs, strict=True) if name not in there]:
        raise ValueError(f"the program computes nothing of its input {', '.join(unused)}: save one that does not take it")
    name_ends(named, [spec.name for spec in request.inputs], [spec.name for spec in request.outputs])
    write_model(named, path)


def _unreadable(form: CheckpointFormat, writer: str, error: Exception) -> StepFailed:
    words = str(error).partition("Exception raised from")[0]  # torch appends its own stack
    return StepFailed(
        Reason.CHECKPOINT_UNREADABLE,
        f"the checkpoint cannot be read as {form} ({writer}) by torch {torch.__version__}: {type(error).__name__}: {words[:600]}",
    )
