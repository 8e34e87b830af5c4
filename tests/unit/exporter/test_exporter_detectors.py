"""Torchvision's detection models through the whole Job: what is served is what torchvision's own code answers."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import convert_and_prove, file_request

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the command line does, before onnxruntime is imported

import onnx  # noqa: E402
import torchvision  # noqa: E402

from exports.make import lively  # noqa: E402
from perch_exporter.architectures import build_model  # noqa: E402
from perch_exporter.contract import (  # noqa: E402
    Architecture,
    ExportRequest,
    Outcome,
    ParityTolerance,
    Reason,
    TensorSpec,
    Verdict,
)
from perch_exporter.convert import convert  # noqa: E402
from perch_exporter.detectors import BatchedDetector, Detector, build_detector  # noqa: E402
from perch_exporter.failure import StepFailed  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.parity import Answers, judge  # noqa: E402
from perch_exporter.prove import prove  # noqa: E402
from perch_exporter.publish import publish  # noqa: E402
from perch_exporter.samples import load_golden, make_inputs  # noqa: E402
from perch_exporter.workspace import GOLDEN, MODEL, Workspace  # noqa: E402

LITE = "torchvision:ssdlite320_mobilenet_v3_large"
SMALL = {"minSize": 128, "maxSize": 150}  # 60 x 100 becomes 90 x 150, which is no multiple of 32
CASES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    (LITE, {}, (320, 320)),
    ("torchvision:ssd300_vgg16", {}, (300, 400)),
    ("torchvision:retinanet_resnet50_fpn", SMALL, (60, 100)),
    ("torchvision:retinanet_resnet50_fpn_v2", SMALL, (60, 100)),
    ("torchvision:fcos_resnet50_fpn", SMALL, (60, 100)),
]


def detector(name: str, parameters: Mapping[str, Any], size: tuple[int, int], classes: int = 7) -> Any:
    architecture = Architecture(name=name, parameters={"numClasses": classes, **parameters})
    torch.manual_seed(0)
    spec = TensorSpec(name="image", data_type="FP32", shape=(3, *size))
    return lively(build_detector(architecture, {}), torch.from_numpy(make_inputs([spec], "0123abcd", 4)["image"]))


def outputs(most: int) -> list[dict[str, Any]]:
    return [
        {"name": "boxes", "dataType": "FP32", "shape": [most, 4]},
        {"name": "labels", "dataType": "INT64", "shape": [most]},
        {"name": "scores", "dataType": "FP32", "shape": [most]},
    ]


def asked_for(root: Path, model: Any, name: str, parameters: Mapping[str, Any], size: tuple[int, int]) -> ExportRequest:
    packed = io.BytesIO()
    torch.save(model.state_dict(), packed)
    return file_request(
        root,
        packed.getvalue(),
        architecture={"name": name, "parameters": {"numClasses": 7, **parameters}},
        inputs=[{"name": "image", "dataType": "FP32", "shape": [3, *size]}],
        outputs=outputs(model.detections_per_img),
    )


@pytest.mark.parametrize(("name", "parameters", "size"), CASES, ids=[case[0].partition(":")[2] for case in CASES])
def test_a_detector_is_published_with_the_answers_of_torchvision(
    tmp_path: Path, name: str, parameters: dict[str, Any], size: tuple[int, int]
) -> None:
    model = detector(name, parameters, size)
    asked = asked_for(tmp_path, model, name, parameters, size)
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    summary = publish(asked, workspace, {})
    assert summary.outcome is Outcome.PUBLISHED
    assert summary.parity is not None
    print(summary.parity.message)
    assert summary.parity.max_relative_error is not None
    assert summary.parity.max_relative_error <= 0.005

    golden = load_golden(workspace.output / GOLDEN)
    with torch.inference_mode():
        own = model([torch.from_numpy(golden.inputs["image"][1])])[0]
    there = len(own["scores"])
    assert there > 10
    np.testing.assert_allclose(golden.outputs["boxes"][1, :there], own["boxes"].numpy(), atol=1e-3)
    assert not golden.outputs["scores"][1, there:].any()
    nodes = [node.op_type for node in onnx.load(workspace.output / MODEL).graph.node]
    assert nodes.count("NonMaxSuppression") == 1
    assert not {"Loop", "Scan", "If"} & set(nodes)


def test_an_export_that_suppresses_other_boxes_fails(tmp_path: Path) -> None:
    model = detector(LITE, {}, (320, 320))
    asked = asked_for(tmp_path, model, LITE, {}, (320, 320))
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    convert(asked, workspace)
    prove(asked, workspace)
    path = workspace.output / MODEL
    made = onnx.load(path)
    (suppression,) = [node for node in made.graph.node if node.op_type == "NonMaxSuppression"]
    other = onnx.numpy_helper.from_array(np.array([0.2], np.float32), "another_overlap")
    made.graph.initializer.append(other)
    suppression.input[3] = other.name
    onnx.save(made, path)
    with pytest.raises(StepFailed, match=r"have no partner of the same label") as error:
        prove(asked, workspace)
    assert error.value.reason is Reason.PARITY_FAILED


def test_weights_that_see_nothing_are_told_from_a_difference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameters = {"scoreThresh": 0.99}
    model = build_detector(Architecture(name=LITE, parameters={"numClasses": 7, **parameters}), {})
    asked = asked_for(tmp_path, model, LITE, parameters, (320, 320))
    workspace = Workspace(tmp_path / "work")
    fetch(asked, workspace, {})
    with pytest.raises(StepFailed, match="finds nothing for certain in the samples") as error:
        convert_and_prove(asked, workspace)
    assert error.value.reason is Reason.PARITY_UNPROVABLE


def test_both_forms_of_a_detector_find_the_same() -> None:
    model = detector(LITE, {"detectionsPerImg": 40}, (320, 320))
    spec = TensorSpec(name="image", data_type="FP32", shape=(3, 320, 320))
    images = torch.from_numpy(make_inputs([spec], "0123abcd", 3)["image"])
    with torch.inference_mode():
        answers = [form.eval()(images) for form in (Detector(model), BatchedDetector(model, (3, 320, 320)))]
    own, batched = (dict(zip(("boxes", "labels", "scores"), map(np.asarray, answer), strict=True)) for answer in answers)
    assert own["boxes"].shape == (3, 40, 4)
    parity = judge([Answers(own, batched, "")], asked_tolerance())
    assert (parity.verdict, parity.max_relative_error) == (Verdict.PASSED, 0), parity.message


def asked_tolerance() -> ParityTolerance:
    return ParityTolerance(relative_tolerance="1e-2", minimum_iou="0.9")


def test_a_checkpoint_that_was_trained_from_imagenets_weights_finds_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torchvision.models.mobilenet_v3_large().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_args, **_options: there)
    builder = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    architecture = Architecture(name=LITE, parameters={"numClasses": 7})
    for backbone in ("IMAGENET1K_V1", None):
        trained = builder(weights=None, weights_backbone=backbone, num_classes=7).state_dict()
        built = build_detector(architecture, {f"module.{key}": tensor for key, tensor in trained.items()})
        built.load_state_dict(trained)


@pytest.mark.parametrize("name", ["weightsBackbone", "pretrained", "boxScoreThresh", "minSize"])
def test_a_parameter_that_torchvision_would_swallow_is_refused(name: str) -> None:
    with pytest.raises(StepFailed, match=f"has no parameter {name}; there are detectionsPerImg, ") as error:
        build_detector(Architecture(name=LITE, parameters={name: 1}), {})
    assert error.value.reason is Reason.INVALID_PARAMETERS


def test_a_parameter_that_is_no_number_is_refused() -> None:
    with pytest.raises(StepFailed, match="takes numbers, and scoreThresh is none"):
        build_detector(Architecture(name=LITE, parameters={"scoreThresh": "high"}), {})


@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "fcn_resnet50"]
)
def test_what_answers_otherwise_is_refused_by_name(name: str) -> None:
    words = rf"{name} of torchvision .* torchvision:ssdlite320_mobilenet_v3_large; .* masks"
    with pytest.raises(StepFailed, match=words) as error:
        build_model(Architecture(name=f"torchvision:{name}"), ())
    assert error.value.reason is Reason.UNKNOWN_ARCHITECTURE
