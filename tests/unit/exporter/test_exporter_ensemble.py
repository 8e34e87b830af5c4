"""What a version that takes pictures is published as, and the golden check that its pictures pass through it."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import PICTURES, file_request, golden, hand_over, hand_over_pictures, request, wheel_folder
from tritonclient.grpc import model_config_pb2 as pb

from perch_exporter.contract import Location, Reason
from perch_exporter.download import download
from perch_exporter.failure import StepFailed
from perch_exporter.fetch import fetch
from perch_exporter.golden import Artifact, check
from perch_exporter.pictures import Recipe
from perch_exporter.publish import publish
from perch_exporter.ranking import Ranking, rank
from perch_exporter.samples import Golden
from perch_exporter.triton_config import parse_config
from perch_exporter.workspace import PICTURES as PICTURES_FILE
from perch_exporter.workspace import Workspace


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERCH_PILLOW_WHEELS", str(wheel_folder(tmp_path / "wheels")))
    return tmp_path / "wheels"


def published(root: Path, content: Golden | None = None, **changes: Any) -> Path:
    """The pod's folder after download."""
    asked = file_request(root, b"a checkpoint", **(PICTURES | changes))
    workspace = Workspace(root / "work")
    hand_over_pictures(workspace, content)
    summary = publish(asked, workspace, {})
    assert summary.artifact_digest
    download(Location(uri=asked.destination.uri), summary.artifact_digest, root / "pod", {})
    return root / "pod"


def config(pod: Path, model: str) -> pb.ModelConfig:
    return parse_config((pod / "models" / model / "config.pbtxt").read_text())


def test_the_served_name_is_an_ensemble_of_three_models_that_fit_together(tmp_path: Path) -> None:
    pod = published(tmp_path, version=4)
    models = ["digits", "digits-network", "digits-postprocess", "digits-preprocess"]
    assert sorted(path.name for path in (pod / "models").iterdir()) == models
    for name in models:
        read = config(pod, name)
        assert read.name == name
        assert read.max_batch_size == 3
        assert list(read.version_policy.specific.versions) == [4]
        assert (pod / "models" / name / "4").is_dir(), "Triton loads a version whose folder is there"
    whole = config(pod, "digits")
    assert whole.platform == "ensemble"
    assert [(t.name, t.data_type, list(t.dims)) for t in whole.input] == [("image", pb.TYPE_STRING, [1])]
    assert [(t.name, t.data_type, list(t.dims)) for t in whole.output] == [
        ("labels", pb.TYPE_STRING, [3]),
        ("scores", pb.TYPE_FP32, [3]),
    ]
    fed = {"image": whole.input[0]}
    for step in whole.ensemble_scheduling.step:
        inner = config(pod, step.model_name)
        assert step.model_version == 4
        assert set(step.input_map) == {tensor.name for tensor in inner.input}
        assert set(step.output_map) == {tensor.name for tensor in inner.output}
        for tensor in inner.input:
            source = fed[step.input_map[tensor.name]]
            assert (source.data_type, list(source.dims)) == (tensor.data_type, list(tensor.dims))
        fed |= {step.output_map[tensor.name]: tensor for tensor in inner.output}
    for tensor in whole.output:
        assert list(fed[tensor.name].dims) == list(tensor.dims)


def test_without_postprocessing_the_networks_own_outputs_are_answered(tmp_path: Path) -> None:
    pod = published(tmp_path, postprocessing=None, triton={"maxBatchSize": 3})
    assert sorted(path.name for path in (pod / "models").iterdir()) == ["digits", "digits-network", "digits-preprocess"]
    assert [(t.name, list(t.dims)) for t in config(pod, "digits").output] == [("logits", [10])]


def test_the_models_get_code_settings_labels_and_wheels(tmp_path: Path, wheels: Path) -> None:
    pod = published(tmp_path)
    front, back, network = (pod / "models" / f"digits-{part}" for part in ("preprocess", "postprocess", "network"))
    assert sorted(p.name for p in (front / "wheels").iterdir()) == sorted(p.name for p in wheels.iterdir())
    for folder, code in ((front, "pictures"), (back, "ranking")):
        compile((folder / "1/model.py").read_text(), "model.py", "exec")
        assert (folder / f"1/perch_exporter/{code}.py").is_file()
    settings = json.loads(config(pod, "digits-preprocess").parameters["recipe"].string_value)
    recipe = Recipe.from_fields(settings["preprocessing"], settings["shape"])
    assert (recipe.mode, recipe.resize, recipe.crop, recipe.height, recipe.width) == ("L", (28, 28), (), 28, 28)
    labels = "".join(f"digit {n}\n" for n in range(10))
    assert (back / "labels.txt").read_text() == (network / "labels.txt").read_text() == labels
    assert config(pod, "digits").response_cache.enable, "what is remembered is the answer to a picture"
    assert not config(pod, "digits-network").response_cache.enable


def test_the_code_is_of_the_oldest_python_that_a_triton_image_has_and_needs_nothing_but_what_is_there(tmp_path: Path) -> None:
    models = published(tmp_path) / "models"
    codes = sorted(models.rglob("*.py"))
    assert len(codes) == 4
    allowed = {*sys.stdlib_module_names, "numpy", "PIL", "triton_python_backend_utils", "perch_exporter"}
    for code in codes:
        tree = ast.parse(code.read_text(), feature_version=(3, 10))
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in imported} <= allowed, code
        ours = {name.removeprefix("perch_exporter.") for name in imported if name.startswith("perch_exporter.")}
        assert all((code.parent / f"perch_exporter/{name}.py").exists() for name in ours)


def test_without_wheels_to_send_along_the_job_ends_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_PILLOW_WHEELS", str(tmp_path / "nowhere"))
    workspace = Workspace(tmp_path / "work")
    with pytest.raises(StepFailed, match="perch-artifacts image has them") as failed:
        fetch(file_request(tmp_path, b"a checkpoint", **PICTURES), workspace, {})
    assert failed.value.reason is Reason.INVALID_REQUEST
    assert not workspace.checkpoint.exists()


@pytest.mark.parametrize(
    ("what", "arrays", "says"),
    [
        ("none at all", None, "missing"),
        ("fewer than samples", {"0": np.frombuffer(b"\xff\xd8\xff", np.uint8)}, "1 entries, and there are 4"),
        ("numbers", {str(n): np.zeros(3, np.float32) for n in range(4)}, "not a row of bytes"),
        ("objects", {str(n): np.array([b"\xff\xd8\xff"], np.object_) for n in range(4)}, "cannot be used"),
        ("another format", {str(n): np.frombuffer(b"GIF89a", np.uint8) for n in range(4)}, "neither a JPEG nor a PNG"),
    ],
)
def test_pictures_that_are_none_are_not_published(tmp_path: Path, what: str, arrays: Any, says: str) -> None:
    asked = file_request(tmp_path, b"a checkpoint", **PICTURES)
    workspace = Workspace(tmp_path / "work")
    hand_over(workspace)
    if arrays is not None:
        np.savez(workspace.output / PICTURES_FILE, **arrays)
    with pytest.raises(StepFailed, match=says) as failed:
        publish(asked, workspace, {})
    assert failed.value.reason is Reason.OUTPUT_REJECTED


def test_pictures_that_nobody_asked_for_are_not_published(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work")
    hand_over_pictures(workspace)
    with pytest.raises(StepFailed, match="unexpected"):
        publish(file_request(tmp_path, b"a checkpoint"), workspace, {})


@dataclass
class Network:
    """Answers the golden tensors as the checkpoint did."""

    content: Golden

    def is_ready(self) -> bool:
        return True

    def infer(self, inputs: Any, outputs: list[str]) -> dict[str, Any]:
        known = {sample.tobytes(): row for sample, row in zip(*(v for g in (self.content.inputs, self.content.outputs)
                 for v in g.values()), strict=True)}  # fmt: skip
        return {"logits": np.stack([known[sample.tobytes()] for sample in inputs["image"]])}


@dataclass
class Front:
    """Answers the golden pictures, which tell their places, as an ensemble would; `wrong` changes what it says."""

    content: Golden
    ranking: Ranking | None
    wrong: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
    batches: list[int] = field(default_factory=list)

    def is_ready(self) -> bool:
        return True

    def infer(self, inputs: Any, outputs: list[str]) -> dict[str, Any]:
        pictures = inputs["image"]
        assert pictures.dtype == np.object_
        assert pictures.shape == (len(pictures), 1)
        self.batches.append(len(pictures))
        logits = self.content.outputs["logits"][[picture[-1] for (picture,) in pictures]]
        if self.ranking is None:
            return self.wrong({"logits": logits})
        return self.wrong(dict(zip(("labels", "scores"), rank(logits, self.ranking), strict=True)))


RANKING = Ranking(softmax=True, top=3, labels=[f"digit {n}" for n in range(10)])


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: {**answer, name: change(answer[name])}


def test_right_answers_to_pictures_alone_and_in_batches_make_it_ready(tmp_path: Path) -> None:
    artifact = Artifact.load(published(tmp_path))
    assert artifact.network == "digits-network"
    front = Front(golden(), RANKING)
    assert check(artifact, Network(golden()), front).ready
    assert front.batches == [1, 1, 1, 1, 3, 1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (changed("scores", lambda scores: scores + np.float32(0.9)), "scores: largest error 0.9"),
        (changed("scores", lambda scores: scores * np.float32("nan")), "largest error nan"),
        (changed("scores", lambda scores: scores[:, :2]), r"scores has shape \[4, 2\]"),
        (changed("labels", lambda labels: labels[:, ::-1]), "which is another's"),
        (changed("labels", lambda labels: np.full_like(labels, b"digit 77")), "is called 'digit 77'"),
    ],
)
def test_wrong_names_or_scores_keep_it_from_being_ready(tmp_path: Path, wrong: Any, says: str) -> None:
    readiness = check(Artifact.load(published(tmp_path)), Network(golden()), Front(golden(), RANKING, wrong))
    assert not readiness.ready
    assert "does not answer to pictures as its checkpoint does" in readiness.sentence
    assert re.search(says, readiness.sentence), readiness.sentence


def test_without_postprocessing_the_parity_rule_judges_the_answers_to_pictures(tmp_path: Path) -> None:
    artifact = Artifact.load(published(tmp_path, postprocessing=None, triton={"maxBatchSize": 3}))
    assert check(artifact, Network(golden()), Front(golden(), None)).ready
    off = Front(golden(), None, changed("logits", lambda logits: logits + np.float32(20)))
    assert "largest error 20" in check(artifact, Network(golden()), off).sentence


def test_classes_of_one_score_may_change_places(tmp_path: Path) -> None:
    tied = golden()
    tied.outputs["logits"][:, 5] = tied.outputs["logits"][:, 2]
    swap = {b"digit 2": b"digit 5", b"digit 5": b"digit 2"}
    names = np.vectorize(lambda name: swap.get(name, name), otypes=[object])
    artifact = Artifact.load(published(tmp_path, tied))
    assert check(artifact, Network(tied), Front(tied, RANKING, changed("labels", names))).ready


def test_the_network_is_judged_by_tensors_too(tmp_path: Path) -> None:
    """Softmax hides what is wrong with small scores."""
    other = golden()
    other.outputs["logits"][:] += 20
    readiness = check(Artifact.load(published(tmp_path)), Network(other), Front(golden(), RANKING))
    assert "logits: largest error 20" in readiness.sentence


@pytest.mark.parametrize("softmax", [True, False])
def test_ranking_gives_the_best_first_and_the_first_of_equals(softmax: bool) -> None:
    logits = np.float32([[0, 3, 1, 3], [1000, -1000, 999, 0]])
    names, scores = rank(logits, Ranking(softmax, 2, ["a", "b", "ü", "d"]))
    assert [[name.decode() for name in row] for row in names] == [["b", "d"], ["a", "ü"]]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = (shares / shares.sum(axis=1, keepdims=True)) if softmax else logits
    assert np.allclose(scores, np.sort(expected, axis=1)[:, ::-1][:, :2])
    assert scores.dtype == np.float32


def test_without_labels_classes_are_called_by_their_number() -> None:
    names, _ = rank(np.float32([[0, 1]]), Ranking(False, 2, ()))
    assert names.tolist() == [[b"1", b"0"]]


def test_a_request_for_pictures_survives_the_way_through_json() -> None:
    asked = request(**PICTURES)
    assert type(asked).from_json(asked.to_json()) == asked
