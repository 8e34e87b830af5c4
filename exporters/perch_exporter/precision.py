"""Rewrites an FP32 ONNX file in another precision. Part of convert; onnxruntime's own tools do the work.

Inputs and outputs stay FP32, so clients do not change. What comes out is proven by the parity gate like any other file.

FP16: weights and compute in half precision, but for what half precision cannot hold. `_FP32_OPERATORS` stay because they
sum or exponentiate many values. Single nodes stay where the golden samples show tensors that come near FP16's largest number
(65504) or never leave the range in which it loses digits: other samples get as far again before anything overflows.

INT8: static quantization by onnxruntime's quantizer after its own preparation, which folds batch normalization into the layer
before. Weights get a scale for each channel, activations one each from the least and greatest value over the calibration set;
unsigned, since that is what x86's VNNI instructions multiply, or signed and symmetric for TensorRT, which knows nothing else.
Quantize and dequantize stand as nodes in the file (QDQ).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from perch_exporter.contract import Conversion, Precision, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.onnx_file import write_model
from perch_exporter.samples import Array, Tensors

log = logging.getLogger(__name__)

_FP32_OPERATORS = (
    *DEFAULT_OP_BLOCK_LIST,
    # Normalization: statistics, and an epsilon that FP16 rounds to nothing.
    *("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "LpNormalization", "LRN"),
    *("Softmax", "LogSoftmax", "Exp", "Log", "Pow"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd"),
    *("GlobalAveragePool", "GlobalLpPool"),
)
_NEAR_OVERFLOW = 65504 / 8
_ALL_TINY = 2.0**-8
"""A tensor whose largest value is below: numbers 64 times smaller are FP16's subnormal ones, and lose their digits."""

_BATCH = 8

_TENSORRT_OPTIONS = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "DedicatedQDQPair": True}
"""Zero points of 0, biases in FP32, and a pair of nodes for each reader: what TensorRT's explicit quantization asks for."""


def lower_precision(conversion: Conversion, path: Path, samples: Tensors, for_tensorrt: bool = False) -> None:
    """Replaces the model at `path`, and what lies beside it, by one of the conversion's precision. Raises ExportFailed.

    for_tensorrt: INT8 as TensorRT reads it.
    """
    if conversion.precision is Precision.FP32:
        return
    try:
        if conversion.precision is Precision.FP16:
            _to_fp16(path, samples)
        else:
            _to_int8(path, samples, for_tensorrt)
    except Exception as error:
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"the model cannot be brought to {conversion.precision}: {type(error).__name__}: {error}; "
            "conversion.precision: FP32 serves it as it is",
        ) from error


def _to_fp16(path: Path, samples: Tensors) -> None:
    model = onnx.load(path)
    kept = _out_of_range(path, model, samples)
    if kept:
        log.info("%d nodes stay in FP32 for the size of their numbers: %s", len(kept), ", ".join(kept[:10]))
    model = convert_float_to_float16(
        model, min_positive_val=2.0**-24, max_finite_val=65504.0, keep_io_types=True,
        op_block_list=_FP32_OPERATORS, node_block_list=kept,
    )  # fmt: skip
    _tidy(model.graph)
    ordered = onnx_ir.from_proto(model)
    TopologicalSortPass()(ordered)  # the converter appends its casts
    write_model(ordered, path)


def _to_int8(path: Path, samples: Tensors, for_tensorrt: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        quant_pre_process(path, prepared, save_as_external_data=True, all_tensors_to_one_file=True)
        quantize_static(
            prepared,
            quantized,
            Batches(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8 if for_tensorrt else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options=_TENSORRT_OPTIONS if for_tensorrt else {},
        )
        write_model(onnx_ir.load(quantized), path)


def _out_of_range(path: Path, model: onnx.ModelProto, samples: Tensors) -> list[str]:
    """Names of the nodes that read or write what FP16 does not hold well."""
    largest = {name: max(-low, high) for name, (low, high) in tensor_ranges(path, samples).items()}
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            largest[weight.name] = float(np.abs(onnx.numpy_helper.to_array(weight)).max(initial=0))
    outside = {name for name, size in largest.items() if size >= _NEAR_OVERFLOW or 0 < size < _ALL_TINY}
    return [node.name for node in model.graph.node if node.name and outside.intersection((*node.input, *node.output))]


def tensor_ranges(path: Path, samples: Tensors) -> dict[str, tuple[float, float]]:
    """The least and greatest value of every float tensor of the graph over the samples."""
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            path,
            augmented_model_path=str(Path(folder) / "ranges.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
        )
        calibrator.collect_data(Batches(samples))
        found = calibrator.compute_data()
    return {name: (float(found[name].lowest.min()), float(found[name].highest.max())) for name in found.keys()}  # noqa: SIM118


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Samples in batches, as onnxruntime's calibrators read them."""

    def __init__(self, samples: Tensors) -> None:
        self._parts = self._cut(samples)

    @staticmethod
    def _cut(samples: Tensors) -> Iterator[dict[str, Array]]:
        count = len(next(iter(samples.values())))
        for start in range(0, count, _BATCH):
            yield {name: array[start : start + _BATCH] for name, array in samples.items()}

    def get_next(self) -> dict[str, Array] | None:
        return next(self._parts, None)


def _tidy(graph: onnx.GraphProto) -> None:
    """Takes out what the converter puts in too much.

    It makes a cast of one name for each reader of a tensor, which no runtime loads. And between two nodes that stay in FP32 it
    casts to FP16 and back, through which nothing passes that FP16 does not hold.
    """
    nodes = list({tuple(node.output): node for node in graph.node}.values())
    wide = {node.output[0]: node.input[0] for node in nodes if _is_its_own(node, onnx.TensorProto.FLOAT16)}
    instead: dict[str, str] = {}
    for node in nodes:
        if _is_its_own(node, onnx.TensorProto.FLOAT) and node.input[0] in wide:
            instead[node.output[0]] = wide[node.input[0]]
    outputs = {output.name for output in graph.output}
    kept = []
    for node in nodes:
        if node.output[0] not in instead:
            for place, name in enumerate(node.input):
                node.input[place] = instead.get(name, name)
            kept.append(node)
        elif node.output[0] in outputs:
            kept.append(onnx.helper.make_node("Identity", [instead[node.output[0]]], [node.output[0]], name=node.name))
    read = {name for node in kept for name in node.input} | outputs
    del graph.node[:]
    graph.node.extend(node for node in kept if not _is_its_own(node, onnx.TensorProto.FLOAT16) or node.output[0] in read)


def _is_its_own(node: onnx.NodeProto, kind: int) -> bool:
    """Whether the converter made this cast; one of the model itself may begin at integers."""
    made = node.name.endswith(("_cast_to_fp16_node", "_cast_to_fp32_node")) or node.name.startswith(
        ("graph_input_cast", "graph_output_cast")
    )
    return bool(node.op_type == "Cast" and made and node.attribute[0].i == kind)
