"""Lower precisions with the real onnxruntime: what becomes of the weights, what stays in FP32, and how it is judged."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import convert_and_prove, file_request

from perch_exporter.contract import Conversion, Outcome, Precision, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.fetch import fetch
from perch_exporter.parity import Answers, judge
from perch_exporter.publish import publish
from perch_exporter.samples import load_golden
from perch_exporter.workspace import GOLDEN, MODEL, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the command line does, before onnxruntime is imported

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from perch_exporter import precision as module  # noqa: E402
from perch_exporter.architectures import LeNet5  # noqa: E402
from perch_exporter.precision import lower_precision  # noqa: E402

HALF = Conversion(precision=Precision.FP16)


@pytest.fixture
def lenet(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(LeNet5().state_dict(), tmp_path / "v1.pt")
    return tmp_path / "v1.pt"


def graph(path: Path, nodes: list[Any], weights: dict[str, Any], size: int = 8) -> Path:
    """A model of `x` [N, size] to `y` [N, size]."""
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        "made",
        [value("x", onnx.TensorProto.FLOAT, ["n", size])],
        [value("y", onnx.TensorProto.FLOAT, ["n", size])],
        [onnx.numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    onnx.save(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), [output], name=f"make_{output}", **attributes)


def run(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]


@pytest.fixture
def x() -> Any:
    return np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


def kinds(path: Path) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_fp16_goes_the_whole_way_and_clients_still_speak_fp32(lenet: Path, tmp_path: Path) -> None:
    sizes = {}
    for precision in ("FP32", "FP16"):
        asked = file_request(tmp_path / precision, lenet, conversion__precision=precision, artifactRevision="0123abcd")
        workspace = Workspace(tmp_path / precision / "work")
        fetch(asked, workspace, {})
        convert_and_prove(asked, workspace)
        sizes[precision] = (workspace.output / MODEL).stat().st_size
        session = onnxruntime.InferenceSession(workspace.output / MODEL)
        assert {tensor.type for tensor in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
        summary = publish(asked, workspace, {})
        assert summary.outcome is Outcome.PUBLISHED
        assert summary.parity is not None
    assert sizes["FP16"] < 0.6 * sizes["FP32"]
    assert onnx.TensorProto.FLOAT not in kinds(workspace.output / MODEL).values()
    assert "(allowed 5e-2)" in summary.parity.message


def test_a_tolerance_that_fp16_cannot_hold_fails_and_says_by_how_much(lenet: Path, tmp_path: Path) -> None:
    asked = file_request(tmp_path, lenet, conversion__precision="FP16", verification__parity__relativeTolerance="1e-6")
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    with pytest.raises(StepFailed, match=r"of the answers' spread of .* \(allowed 1e-6\).*precision: FP32") as caught:
        convert_and_prove(asked, workspace)
    assert caught.value.reason is Reason.PARITY_FAILED


OVERFLOWS = [node("Mul", "x up", "high"), node("Mul", "high down", "y")]


@pytest.mark.parametrize("factor", [1e6, 1e-9], ids=["overflow", "vanish"])
def test_numbers_that_fp16_does_not_hold_stay_in_fp32(factor: float, x: Any, tmp_path: Path, monkeypatch: Any) -> None:
    weights = {"up": [factor], "down": [1 / factor]}
    path = graph(tmp_path / "kept.onnx", OVERFLOWS, weights)
    lower_precision(HALF, path, {"x": x})
    assert np.allclose(run(path, x), x, rtol=1e-2, atol=1e-2)

    # The control: without the look at the samples they are lost.
    monkeypatch.setattr(module, "_out_of_range", lambda *_: [])
    path = graph(tmp_path / "lost.onnx", OVERFLOWS, weights)
    lower_precision(HALF, path, {"x": x})
    assert not np.allclose(run(path, x), x, rtol=1e-2, atol=1e-2)


def test_a_tensor_that_several_nodes_read_in_fp32_is_cast_once(x: Any, tmp_path: Path) -> None:
    """As in DenseNet, where the converter made a cast of the same name for each reader, and no runtime loaded the file."""
    statistics = {"one": np.ones(8), "zero": np.zeros(8)}
    normalize = "one zero zero one"
    nodes = [
        node("Mul", "x two", "wide"),
        node("BatchNormalization", f"wide {normalize}", "left"),
        node("BatchNormalization", f"wide {normalize}", "right"),
        node("Add", "left right", "y"),
    ]
    path = graph(tmp_path / "model.onnx", nodes, {"two": [2.0], **statistics})
    lower_precision(HALF, path, {"x": x})
    onnx.checker.check_model(path, full_check=True)
    assert np.allclose(run(path, x), 4 * x, rtol=1e-2, atol=1e-2)


def test_normalization_and_softmax_stay_in_fp32(x: Any, tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "mixed"),
        node("BatchNormalization", "mixed one zero zero one", "normal"),
        node("Softmax", "normal", "y"),
    ]
    weights = {"w": np.eye(8), "one": np.ones(8), "zero": np.zeros(8)}
    path = graph(tmp_path / "model.onnx", nodes, weights)
    lower_precision(HALF, path, {"x": x})
    types = kinds(path)
    assert types["w"] == onnx.TensorProto.FLOAT16
    assert {types["one"], types["zero"]} == {onnx.TensorProto.FLOAT}
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    element = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.output)}
    softmax = next(made for made in inferred.node if made.op_type == "Softmax")
    assert element[softmax.input[0]] == onnx.TensorProto.FLOAT


def test_a_cast_of_the_models_own_is_not_taken_for_the_converters(x: Any, tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "whole", to=onnx.TensorProto.INT64),
        node("Cast", "whole", "back", to=onnx.TensorProto.FLOAT),
        node("Softmax", "back", "y"),
    ]
    path = graph(tmp_path / "model.onnx", nodes, {})
    expected = run(path, 3 * x)
    lower_precision(HALF, path, {"x": 3 * x})
    assert np.allclose(run(path, 3 * x), expected, atol=1e-3)


def test_a_model_that_cannot_be_brought_down_says_so_and_names_the_way_out(x: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(StepFailed, match=r"cannot be brought to FP16: .*precision: FP32 serves it") as caught:
        lower_precision(HALF, path, {"x": x})
    assert caught.value.reason is Reason.EXPORT_FAILED


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    """Pictures of two kinds, and a LeNet-5 that has learned to tell ten of them apart a little: trained, as INT8 expects."""
    random = np.random.default_rng(0)
    labels = np.arange(320) % 10
    kinds = random.standard_normal((10, 1, 28, 28))
    images = (kinds[labels] + 0.5 * random.standard_normal((320, 1, 28, 28))).astype(np.float32)
    torch.manual_seed(0)
    model = LeNet5()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
        optimizer.step()
    return model.state_dict(), images


def int8_request(tmp_path: Path, weights: Any, images: Any, **changes: Any) -> Any:
    torch.save(weights, tmp_path / "v1.pt")
    np.savez(tmp_path / "samples.npz", image=images)
    samples = tmp_path / "samples.npz"
    sha256 = hashlib.sha256(samples.read_bytes()).hexdigest()
    conversion = {"precision": "INT8", "calibration": {"uri": samples.as_uri(), "sha256": sha256}}
    return file_request(tmp_path, tmp_path / "v1.pt", conversion=conversion, **changes)


def test_int8_goes_the_whole_way_and_agrees_on_real_samples(digits: Any, tmp_path: Path) -> None:
    asked = int8_request(tmp_path, *digits)
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    summary = publish(asked, workspace, {})
    assert summary.parity is not None
    assert summary.parity.samples == 128
    assert (summary.parity.top1_agreement or 0) >= 0.95
    assert "(at least 0.9)" in summary.parity.message

    model = onnx.load(workspace.output / MODEL)
    assert {tensor.type for tensor in onnxruntime.InferenceSession(workspace.output / MODEL).get_inputs()} == {"tensor(float)"}
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1]
    assert len(weights) == 5, "every convolution and every full connection"
    scales = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if tensor.name.endswith("c1.weight_scale")}
    assert list(scales.values()) == [[6]], "a scale for each channel"

    golden = load_golden(workspace.output / GOLDEN)
    pictures = {picture.tobytes() for picture in digits[1]}
    assert all(picture.tobytes() in pictures for picture in golden.inputs["image"]), "golden samples are real ones"
    # The whole file, asked as a pod is: by the rule and the tolerance that the manifest carries.
    answers = run_all(workspace.output / MODEL, golden.inputs["image"])
    assert judge([Answers(golden.outputs, {"logits": answers}, "")], asked.tolerance).top1_agreement == 1


def test_int8_for_tensorrt_is_signed_and_symmetric(digits: Any, tmp_path: Path) -> None:
    triton = {"maxBatchSize": 8, "accelerator": "TensorRT", "instanceKind": "GPU"}
    asked = int8_request(tmp_path, *digits, triton=triton)
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    model = onnx.load(workspace.output / MODEL)
    points = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_zero_point")]
    assert points
    assert {tensor.data_type for tensor in points} == {onnx.TensorProto.INT8}
    assert not any(onnx.numpy_helper.to_array(tensor).any() for tensor in points)


def run_all(path: Path, images: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"image": images})[0]


def test_samples_that_the_network_never_sees_make_an_int8_that_fails(digits: Any, tmp_path: Path) -> None:
    """The control: calibrated on next to nothing, every activation is clipped, and the gate says by how much it is off."""
    weights, images = digits
    asked = int8_request(tmp_path, weights, images)
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    narrow = partial(module.lower_precision, asked.conversion)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "perch_exporter.convert.lower_precision",
            lambda _, path, samples, **more: narrow(path, {"image": samples["image"] * 0.05}, **more),
        )
        with pytest.raises(StepFailed, match=r"of the answers' spread.*this is INT8, conversion.precision: FP32") as caught:
            convert_and_prove(asked, workspace)
    assert caught.value.reason is Reason.PARITY_FAILED


def test_a_calibration_set_of_a_few_samples_is_refused(digits: Any, tmp_path: Path) -> None:
    weights, images = digits
    asked = int8_request(tmp_path, weights, images[:15])
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    with pytest.raises(StepFailed, match="has 15 samples, and 16 are the fewest") as caught:
        convert_and_prove(asked, workspace)
    assert caught.value.reason is Reason.DATASET_UNREADABLE


def test_features_of_a_layer_in_int8_are_judged_by_distance_and_direction(digits: Any, tmp_path: Path) -> None:
    features = [{"name": "features", "dataType": "FP32", "shape": [84]}]
    asked = int8_request(tmp_path, *digits, architecture__layer="f6", outputs=features)
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    summary = publish(asked, workspace, {})
    assert summary.parity is not None
    assert "same class" not in summary.parity.message
    assert summary.parity.cosine is not None
    assert summary.parity.cosine > 0.99
    assert "(at least 0.95)" in summary.parity.message
