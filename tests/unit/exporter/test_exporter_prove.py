"""prove with the real onnxruntime: what convert says is not believed, and the report shows what was seen and runs nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import PICTURES, convert_and_prove, file_request, wheel_folder

from perch_exporter.contract import ExportRequest, Figures, Outcome, Reason, Target, Verdict, Verification
from perch_exporter.failure import StepFailed
from perch_exporter.fetch import fetch
from perch_exporter.parity import judge
from perch_exporter.picture_samples import load_pictures
from perch_exporter.publish import publish
from perch_exporter.samples import Golden, load_golden, save_golden
from perch_exporter.workspace import ANSWERS, FIGURES, GOLDEN, MODEL, REFERENCE, REPORT, Workspace
from perch_exporter.workspace import PICTURES as PICTURES_FILE

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

import onnx  # noqa: E402
from PIL import Image  # noqa: E402

from perch_exporter import prove as prove_step  # noqa: E402
from perch_exporter.architectures import LeNet5  # noqa: E402
from perch_exporter.convert import convert  # noqa: E402
from perch_exporter.onnx_file import GraphFacts, look_at  # noqa: E402
from perch_exporter.prove import prove  # noqa: E402
from perch_exporter.report import ClassRow, Content, Seen, Timing, render  # noqa: E402

SAMPLES = 40


class Export:
    """A sound convert of a LeNet-5 with a labelled set, of which the checkpoint gets all but two right."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.model = LeNet5().eval()
        torch.save(self.model.state_dict(), root / "v1.pt")
        images = np.random.default_rng(0).standard_normal((SAMPLES, 1, 28, 28)).astype(np.float32)
        with torch.inference_mode():
            told = self.model(torch.from_numpy(images)).argmax(1).numpy()
        np.savez(root / "test.npz", image=images, labels=np.where(np.arange(SAMPLES) < 2, (told + 1) % 10, told))
        digest = hashlib.sha256((root / "test.npz").read_bytes()).hexdigest()
        gate = {"dataset": {"uri": (root / "test.npz").as_uri(), "sha256": digest}, "minimum": "0.9"}
        self.request: ExportRequest = file_request(root, root / "v1.pt", verification__accuracy=gate)
        self.workspace = Workspace(root / "work")
        fetch(self.request, self.workspace, {})
        convert(self.request, self.workspace)

    @property
    def output(self) -> Path:
        return self.workspace.output

    def prove(self) -> Figures:
        prove(self.request, self.workspace)
        return Figures.from_json((self.workspace.proof / FIGURES).read_bytes())


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return Export(tmp_path)


def test_the_figures_are_those_of_the_artefact_and_the_report_tells_them(export: Export) -> None:
    figures = export.prove()
    assert figures.accuracy is not None
    assert (figures.accuracy.correct, figures.accuracy.samples) == (SAMPLES - 2, SAMPLES)
    assert figures.tooling.torch == torch.__version__
    report = (export.workspace.proof / REPORT).read_text()
    assert html.escape(figures.parity.message, quote=True).replace("&#x27;", "&#39;") in report
    assert "accuracy 0.9500 on 40 samples" in report
    assert len(re.findall(r"<circle ", report)) == 160, "16 golden samples of 10 figures"
    assert report.count("data:image/png;base64,") == 2
    assert "taken for" in report
    parameters = sum(parameter.numel() for parameter in export.model.parameters())
    assert f"{parameters:,} parameters" in report


def test_a_missed_accuracy_brings_the_figures_and_limits_of_both_gates_along(export: Export) -> None:
    gate = export.request.verification.accuracy
    assert gate is not None
    higher = Verification(accuracy=gate.model_copy(update={"minimum": "0.99"}))
    export.request = export.request.model_copy(update={"verification": higher})
    with pytest.raises(StepFailed, match=r"0\.0400 below the minimum of 0\.99") as failed:
        export.prove()
    judged = failed.value.judged
    assert judged is not None
    assert judged.accuracy is not None
    assert (judged.parity.verdict, judged.accuracy.verdict) == (Verdict.PASSED, Verdict.FAILED)
    assert (judged.accuracy.minimum, judged.tolerance) == ("0.99", export.request.tolerance)


def test_golden_samples_are_real_ones_where_there_is_a_data_set(export: Export) -> None:
    with np.load(export.workspace.object("verification.accuracy.dataset")) as file:
        real = {image.tobytes() for image in file["image"]}
    golden = load_golden(export.output / GOLDEN)
    assert golden.samples == 16
    assert all(image.tobytes() in real for image in golden.inputs["image"])


def another_network(export: Export) -> None:
    """What user code does that wants its own network served: the model is another, the answers are the checkpoint's."""
    model = onnx.load(export.output / MODEL)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    onnx.save(model, export.output / MODEL)


def a_class_more(export: Export) -> None:
    """The last layer gets a row more: what a swapped or wrongly cut network looks like."""
    model = onnx.load(export.output / MODEL)
    bias = next(weight for weight in model.graph.initializer if list(weight.dims) == [10])
    matrix = next(weight for weight in model.graph.initializer if len(weight.dims) == 2 and 10 in weight.dims)
    for weight in (bias, matrix):
        array = onnx.numpy_helper.to_array(weight)
        axis = array.shape.index(10)
        last = np.take(array, [0], axis)
        weight.CopyFrom(onnx.numpy_helper.from_array(np.concatenate([array, last], axis), weight.name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
    onnx.save(model, export.output / MODEL)


def own_figures(export: Export) -> None:
    (export.output / FIGURES).write_text('{"parity": {"verdict": "Passed"}}')


def own_report(export: Export) -> None:
    (export.output / REPORT).write_text("<script>alert(1)</script>")


def weights_elsewhere(export: Export) -> None:
    model = onnx.load(export.output / MODEL)
    tensor = next(weight for weight in model.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../checkpoint/checkpoint")
    (export.output / MODEL).write_bytes(model.SerializeToString())


def golden_of(change: Callable[[Any], Any]) -> Callable[[Export], None]:
    def write(export: Export) -> None:
        golden = load_golden(export.output / GOLDEN)
        save_golden(
            Golden(golden.inputs, {name: change(array) for name, array in golden.outputs.items()}), export.output / GOLDEN
        )

    return write


def bytes_of(name: str, content: bytes) -> Callable[[Export], object]:
    return lambda export: (export.output / name).write_bytes(content)


def answers(array: Any) -> Callable[[Export], None]:
    return lambda export: np.save(export.output / ANSWERS, array)


HOSTILE: dict[str, tuple[Callable[[Export], object], Reason, str]] = {
    "a model of another network": (another_network, Reason.PARITY_FAILED, "largest error"),
    "a model of a class more": (a_class_more, Reason.PARITY_FAILED, r"logits has shape \[16, 11\]"),
    "answers of a class more": (
        golden_of(lambda array: np.concatenate([array, array[:, :1]], axis=1)),
        Reason.OUTPUT_REJECTED,
        r"golden logits has shape \[16, 11\]",
    ),
    "figures of its own": (own_figures, Reason.OUTPUT_REJECTED, "unexpected"),
    "a report of its own": (own_report, Reason.OUTPUT_REJECTED, "unexpected"),
    "weights in another file": (weights_elsewhere, Reason.OUTPUT_REJECTED, "other files"),
    "a model that is none": (bytes_of(MODEL, b"no protobuf at all"), Reason.OUTPUT_REJECTED, "no ONNX file"),
    "answers that are NaN": (golden_of(lambda array: array * np.nan), Reason.PARITY_FAILED, "NaN"),
    "answers that are all alike": (golden_of(lambda array: array * 0), Reason.PARITY_UNPROVABLE, "too alike"),
    "a reference that is no JSON": (bytes_of(REFERENCE, b"{"), Reason.OUTPUT_REJECTED, "reference.json"),
    "a reference with a note": (bytes_of(REFERENCE, b'{"note": "trust me"}'), Reason.OUTPUT_REJECTED, "reference.json"),
    "too few first answers": (answers(np.zeros(SAMPLES - 1, np.int64)), Reason.OUTPUT_REJECTED, "answers.npy"),
    "first answers of another type": (answers(np.zeros(SAMPLES)), Reason.OUTPUT_REJECTED, "answers.npy"),
    "first answers that are pickled": (answers(np.array([None] * SAMPLES, object)), Reason.OUTPUT_REJECTED, "answers.npy"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_convert_hands_over_is_not_believed(name: str, export: Export) -> None:
    change, reason, words = HOSTILE[name]
    change(export)
    with pytest.raises(StepFailed, match=words) as failed:
        export.prove()
    assert failed.value.reason is reason
    assert not (export.workspace.proof / FIGURES).exists()


@pytest.mark.parametrize(("change", "says"), [(another_network, "largest error"), (a_class_more, "has shape")])
def test_a_failed_gate_leaves_a_report_that_shows_why_and_no_figures(
    change: Callable[[Export], None], says: str, export: Export
) -> None:
    change(export)
    with pytest.raises(StepFailed, match=says):
        export.prove()
    assert "Failed" in (export.workspace.proof / REPORT).read_text()
    assert not (export.workspace.proof / FIGURES).exists()


def test_without_the_parity_gate_a_model_of_another_network_would_be_published(export: Export) -> None:
    """The control: nothing after prove looks at what the model answers. The accuracy gate, which would, is not asked for here."""
    export.request = export.request.model_copy(update={"verification": Verification()})
    (export.output / ANSWERS).unlink()
    another_network(export)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove_step, "judge", lambda cases, limits: judge([replace(c, actual=c.reference) for c in cases], limits))
        export.prove()
    assert publish(export.request, export.workspace, {}).outcome is Outcome.PUBLISHED


def test_a_lie_about_the_checkpoint_does_not_raise_the_artefacts_accuracy(export: Export) -> None:
    honest = export.prove().accuracy
    with np.load(export.workspace.object("verification.accuracy.dataset")) as file:
        np.save(export.output / ANSWERS, file["labels"])
    lied = export.prove().accuracy
    assert honest is not None
    assert lied is not None
    assert (lied.correct, lied.checkpoint_correct) == (honest.correct, SAMPLES)


def test_nothing_in_a_report_is_markup_but_the_reports_own(export: Export) -> None:
    evil = "<script>alert(1)</script>"
    text = render(
        Content(
            request=export.request,
            figures=export.prove().model_copy(update={"accuracy": None}),
            graph=GraphFacts(18, 1, ((evil, 1),)),
            checkpoint_bytes=1,
            artifact_bytes=1,
            timing=Timing(1, None, 0.1),
            answers=[(evil, np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))],
            classes=[ClassRow(evil, 1, 1)],
            seen=[Seen(np.zeros((3, 8, 8), np.float32), evil), Seen(np.zeros(10, np.float32), "no picture")],
        )
    )
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert "no picture" not in text


def test_samples_with_their_channels_last_are_pictures_too(export: Export) -> None:
    figures = export.prove()
    shapes = [(3, 8, 9), (8, 9, 3), (8, 9, 1), (1, 8, 9), (8, 9, 4), (8, 9), (3, 2, 9)]
    random = np.random.default_rng(0)
    text = render(
        Content(
            request=export.request,
            figures=figures,
            graph=GraphFacts(18, 1, ()),
            checkpoint_bytes=1,
            artifact_bytes=1,
            timing=Timing(1, None, 0.1),
            answers=[],
            seen=[Seen(random.standard_normal(shape).astype(np.float32), str(list(shape))) for shape in shapes],
        )
    )
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert shown == ["[3, 8, 9]", "[8, 9, 3]", "[8, 9, 1]", "[1, 8, 9]"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"base64,([^\"]+)", text)]
    assert {picture.size for picture in pictures} == {(112, 100)}
    assert [picture.mode for picture in pictures] == ["RGB", "RGB", "L", "L"]


def test_where_a_plan_is_built_the_report_and_a_missed_accuracy_speak_of_the_onnx_file(export: Export) -> None:
    conversion = export.request.conversion.model_copy(update={"target": Target.TENSOR_RT})
    plain = export.prove() and (export.workspace.proof / REPORT).read_text()
    assert "<th>Artefact</th>" in plain
    assert "TensorRT" not in plain
    gate = export.request.verification.accuracy
    assert gate is not None
    higher = Verification(accuracy=gate.model_copy(update={"minimum": "0.99"}))
    export.request = export.request.model_copy(update={"conversion": conversion, "verification": higher})
    with pytest.raises(StepFailed, match=r"of the ONNX file that the plan would be built of"):
        export.prove()
    report = (export.workspace.proof / REPORT).read_text()
    assert "All figures here are the ONNX file's" in report
    assert "<th>ONNX file</th><td>ONNX in FP32" in report
    assert "Artefact" not in report


def test_a_graph_is_counted_with_what_its_branches_hold(export: Export) -> None:
    facts = look_at(export.output / MODEL)
    assert dict(facts.operators)["Conv"] == 3
    assert facts.opset == 18
    assert json.loads((export.output / REFERENCE).read_text())["eagerSeconds"] > 0


@pytest.mark.parametrize("samples", range(1, 17))
def test_each_sample_is_asked_once_in_batches_of_three_sizes(samples: int) -> None:
    batches = prove_step.uneven(samples)
    assert sum(batches) == samples
    assert len(set(batches)) >= min(3, samples // 2)


def test_a_batch_that_the_export_does_not_take_is_named(export: Export) -> None:
    """As of an exporter that fixed a size: any batch goes in, and only those of 2 and more come out."""
    model = onnx.load(export.output / MODEL)
    number = onnx.helper.make_tensor("fixed", onnx.TensorProto.INT64, [1], [1])
    model.graph.initializer.append(number)
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    last.output[:] = ["scores"]
    model.graph.node.append(onnx.helper.make_node("Gather", ["scores", "fixed"], ["one"], axis=0))
    model.graph.node.append(onnx.helper.make_node("Add", ["scores", "one"], ["logits"]))
    onnx.save(model, export.output / MODEL)
    with pytest.raises(StepFailed, match="does not run in batches of 1,") as failed:
        export.prove()
    assert failed.value.reason is Reason.EXPORT_FAILED


# --- data sets of real samples ------------------------------------------------------------------------------------------------


def checkpoint(root: Path) -> Path:
    torch.manual_seed(0)
    torch.save(LeNet5().eval().state_dict(), root / "v1.pt")
    return root / "v1.pt"


def named(path: Path) -> dict[str, str]:
    return {"uri": path.as_uri(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def proven(asked: ExportRequest, root: Path) -> tuple[Figures, Workspace]:
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    return Figures.from_json((workspace.proof / FIGURES).read_bytes()), workspace


def test_samples_of_ones_own_are_what_parity_is_judged_on(tmp_path: Path) -> None:
    images = np.random.default_rng(1).standard_normal((300, 1, 28, 28)).astype(np.float32)
    np.savez(tmp_path / "some.npz", image=images)
    asked = file_request(tmp_path, checkpoint(tmp_path), verification={"samples": named(tmp_path / "some.npz")})
    figures, workspace = proven(asked, tmp_path)
    assert figures.parity.samples == 16
    golden = load_golden(workspace.output / GOLDEN)
    assert np.array_equal(golden.inputs["image"][[0, -1]], images[[0, -1]])


def test_a_set_of_a_few_samples_proves_nothing_and_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", image=np.zeros((3, 1, 28, 28), np.float32))
    asked = file_request(tmp_path, checkpoint(tmp_path), verification={"samples": named(tmp_path / "some.npz")})
    with pytest.raises(StepFailed, match=r"verification.parity.samples has 3 samples, and 4 are the fewest") as failed:
        proven(asked, tmp_path)
    assert failed.value.reason is Reason.DATASET_UNREADABLE


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fetch refuses before minutes of work what publish could not send along."""
    monkeypatch.setenv("PERCH_PILLOW_WHEELS", str(wheel_folder(tmp_path / "wheels")))


def pictures(root: Path, count: int) -> Path:
    random = np.random.default_rng(2)
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for number in range(count):
            packed = io.BytesIO()
            pixels = np.kron(random.integers(0, 256, (8, 8)), np.ones((4, 4))).astype(np.uint8)
            Image.fromarray(pixels).save(packed, "PNG")
            archive.writestr(f"digit {number % 10}/{number}.png", packed.getvalue())
    return root / "pictures.zip"


@pytest.mark.usefixtures("wheels")
def test_accuracy_is_measured_on_pictures_and_pods_are_asked_those_very_pictures(tmp_path: Path) -> None:
    data = pictures(tmp_path, 40)
    gate = {"dataset": named(data), "minimum": "0", "maximumDrop": "0"}
    asked = file_request(tmp_path, checkpoint(tmp_path), **PICTURES, verification__accuracy=gate)
    figures, workspace = proven(asked, tmp_path)
    assert figures.accuracy is not None
    assert figures.accuracy.samples == 40
    with zipfile.ZipFile(data) as archive:
        real = {archive.read(name) for name in archive.namelist()}
    golden = load_pictures(workspace.output / PICTURES_FILE, load_golden(workspace.output / GOLDEN).samples)
    assert len(golden) == 16
    assert set(golden) <= real
    assert re.search(r"digit \d, taken for digit \d", (workspace.proof / REPORT).read_text())


@pytest.mark.usefixtures("wheels")
def test_int8_behind_pictures_is_calibrated_by_pictures_and_by_no_arrays(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    conversion = {"precision": "INT8", "calibration": named(pictures(tmp_path, 40))}
    figures, workspace = proven(file_request(tmp_path, weights, **PICTURES, conversion=conversion), tmp_path)
    assert figures.parity.samples == 40
    assert (workspace.output / PICTURES_FILE).exists()

    np.savez(tmp_path / "arrays.npz", image=np.zeros((16, 1, 28, 28), np.float32))
    conversion = {"precision": "INT8", "calibration": named(tmp_path / "arrays.npz")}
    with pytest.raises(StepFailed, match="give a zip or tar of them") as failed:
        proven(file_request(tmp_path, weights, **PICTURES, conversion=conversion), tmp_path / "arrays")
    assert failed.value.reason is Reason.DATASET_UNREADABLE
