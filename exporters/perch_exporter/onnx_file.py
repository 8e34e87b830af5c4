"""Writes ONNX files, and looks at a ready-made one before it is published as it is. Needs onnx.

What is looked at are bytes that nobody vouches for. Refused is what reaches beyond the one file that was named and whose digest
was checked, and what is not what the version says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from onnx import TensorProto

from perch_exporter.contract import DataType, ExportRequest, Reason, TensorSpec
from perch_exporter.failure import StepFailed
from perch_exporter.handover import rejected
from perch_exporter.workspace import MODEL_DATA

OPSETS = range(7, 24)
"""Of the standard operators: what the onnxruntime of the exporter and of a Triton of the last years both run."""
BESIDE = 64 * 2**20
"""Bytes of weights above which they lie in a file beside the model: onnxruntime maps it, and who looks at the graph reads
kilobytes. No model's own file could hold 2 GiB."""
_STANDARD = ("", "ai.onnx")
_TYPES = {
    DataType.FP32: "tensor(float)",
    DataType.FP16: "tensor(float16)",
    DataType.INT64: "tensor(int64)",
    DataType.INT32: "tensor(int32)",
    DataType.UINT8: "tensor(uint8)",
    DataType.BOOL: "tensor(bool)",
}
"""As onnxruntime calls them."""


def write_model(model: onnx_ir.Model, path: Path) -> None:
    """In the place of what is at `path` and beside it, from which the model's weights may still be read."""
    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    if sum(tensor.nbytes for tensor in weights if tensor is not None) > BESIDE:
        onnx_ir.save(model, path, external_data=MODEL_DATA)
    else:
        onnx_ir.external_data.load_to_model(model)
        onnx_ir.save(model, path)
        path.with_name(MODEL_DATA).unlink(missing_ok=True)
    onnx.checker.check_model(path)


def name_ends(model: onnx_ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the graph's inputs and first outputs these names, in their order. What else is called so gets another name.

    Exporters call inner values after torch's nodes and the network's buffers (sigmoid, mean), and a file has one space of names.
    """
    graph = model.graph
    _tell_apart(graph)
    ends = [*graph.inputs, *graph.outputs[: len(outputs)]]
    names = {value.name for value in _values(model)} | {*inputs, *outputs}
    for value in _values(model):
        if value.name in (*inputs, *outputs) or value in ends:
            value.name = _unused(f"{value.name}_inner", names)
    for value, name in zip(ends, [*inputs, *outputs], strict=True):
        value.name = name


def _tell_apart(graph: onnx_ir.Graph) -> None:
    """An output that is an input as it came, or another output, becomes a value of its own."""
    seen = set(graph.inputs)
    for place, value in enumerate(graph.outputs):
        if value in seen:
            copied = onnx_ir.node("Identity", [value])
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            graph.append(copied)
            graph.outputs[place] = copied.outputs[0]
        seen.add(value)


def _values(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """All of the graph and of those within its nodes."""
    found = []
    for graph in model.graphs():
        found += [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return found


def _unused(name: str, names: set[str | None]) -> str:
    while name in names:
        name += "_"
    names.add(name)
    return name


def lowest_opset(model: onnx_ir.Model) -> tuple[int, str]:
    """The first opset of the standard operators that has all of the model's, and the operator that asks for it."""
    written = model.opset_imports[""]
    lowest, which = written, ""
    for node in model.graph.all_nodes():
        if node.domain not in _STANDARD or onnx.defs.has(node.op_type, written, ""):
            continue
        since = _introduced().get(node.op_type, 0)
        if since > lowest:
            lowest, which = since, node.op_type
    return lowest, which


@cache
def _introduced() -> Mapping[str, int]:
    """The opset that each standard operator came with."""
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    return first


def check_onnx(path: Path) -> int:
    """The opset of the standard operators. Raises CheckpointUnreadable."""
    try:
        model = onnx.load(path, load_external_data=False)
        outside = _outside(model)
        if not outside:
            onnx.checker.check_model(model)
    except Exception as error:  # onnx raises whatever the broken bytes lead it to
        raise _unreadable(f"it is no valid ONNX file: {type(error).__name__}: {str(error)[:400]}") from error
    if outside:
        raise _unreadable(
            f"it keeps weights in other files ({', '.join(outside[:3])}), which no digest covers; save it as one file "
            "(onnx.save with save_as_external_data=False)"
        )
    opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 0)
    if opset not in OPSETS:
        raise _unreadable(f"it has opset {opset} of the standard operators; {OPSETS.start} to {OPSETS.stop - 1} are known")
    return opset


@dataclass(frozen=True)
class GraphFacts:
    opset: int
    parameters: int
    """Numbers in the weights; whole ones of 64 bits are shapes and indices."""
    operators: tuple[tuple[str, int], ...]
    """Kinds of nodes with how many there are, the most frequent first."""


def look_at(path: Path) -> GraphFacts:
    """What an export is made of. Raises OutputRejected for what reaches beyond the file: user code may have written it."""
    try:
        model = onnx.load(path, load_external_data=False)
        outside = _outside(model)
    except Exception as error:  # onnx raises whatever the broken bytes lead it to
        raise rejected(f"{path.name} is no ONNX file: {type(error).__name__}: {str(error)[:400]}") from error
    if outside not in ([], [MODEL_DATA]):
        raise rejected(f"{path.name} keeps weights in other files ({', '.join(outside[:3])}), and {MODEL_DATA} alone may be one")
    kinds = Counter(node.op_type for node in _nodes(model.graph.node))
    return GraphFacts(
        opset=next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 0),
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type != TensorProto.INT64),
        operators=tuple(sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))),
    )


def _unreadable(words: str) -> StepFailed:
    return StepFailed(Reason.CHECKPOINT_UNREADABLE, f"the checkpoint cannot be served as ONNX: {words}")


def _outside(model: onnx.ModelProto) -> list[str]:
    """Every place outside the file that a tensor names: readers differ in which of two they follow."""
    found = set()
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            found |= {entry.value[:100] for entry in tensor.external_data if entry.key == "location"} or {"?"}
    return sorted(found)


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor, also those in nodes, in graphs within nodes, and in functions."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Those within control flow, too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def check_signature(session: Any, request: ExportRequest) -> None:
    """Whether the file's inputs and outputs are the version's, with a batch of any size first. Raises ShapeMismatch."""
    for kind, specs, found in (
        ("inputs", request.inputs, session.get_inputs()),
        ("outputs", request.outputs, session.get_outputs()),
    ):
        there = {tensor.name: tensor for tensor in found}
        if set(there) != {spec.name for spec in specs}:
            raise _mismatch(f"the version names the {kind} {_names(specs)} and the file has {', '.join(sorted(there))}")
        for spec in specs:
            _check(kind, spec, there[spec.name])


def _check(kind: str, spec: TensorSpec, tensor: Any) -> None:
    if tensor.type != _TYPES[spec.data_type]:
        known = {there: name for name, there in _TYPES.items()}
        has = known.get(tensor.type, f"{tensor.type} (not supported)")
        raise _mismatch(f"{kind}: {spec.name} is {has} in the file and {spec.data_type} in the version")
    shape = list(tensor.shape)
    if len(shape) != len(spec.shape) + 1:
        raise _mismatch(
            f"{kind}: {spec.name} has shape {shape} in the file, and {list(spec.shape)} behind a batch in the version"
        )
    if isinstance(shape[0], int):
        raise _mismatch(
            f"{kind}: {spec.name} has a fixed batch of {shape[0]} in the file; export it with a dynamic first dimension"
        )
    for wanted, has in zip(spec.shape, shape[1:], strict=True):
        if isinstance(has, int) and has != wanted:
            raise _mismatch(f"{kind}: {spec.name} has shape {shape[1:]} in the file and {list(spec.shape)} in the version")


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(sorted(spec.name for spec in specs))


def _mismatch(words: str) -> StepFailed:
    return StepFailed(Reason.SHAPE_MISMATCH, words)
