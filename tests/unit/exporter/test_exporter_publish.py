"""publish, download and delete against a folder: hostile hand-overs, half-written prefixes, tampering, and death anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exporter_builders import OWNER, REVISION, STRANGER, DyingStore, Killed, file_request, golden, hand_over, tally

from perch_exporter import delete as delete_step
from perch_exporter import publish as publish_step
from perch_exporter.accuracy import judge_accuracy
from perch_exporter.artifact import published
from perch_exporter.contract import (
    AccuracyGate,
    Claim,
    DeleteRequest,
    ExportRequest,
    Location,
    Manifest,
    OnFailure,
    Outcome,
    Reason,
    Summary,
    Verdict,
)
from perch_exporter.delete import delete
from perch_exporter.download import download
from perch_exporter.failure import StepFailed
from perch_exporter.fetch import fetch
from perch_exporter.publish import publish
from perch_exporter.samples import save_golden
from perch_exporter.store import FileStore
from perch_exporter.triton_config import parse_config
from perch_exporter.workspace import ANSWERS, FIGURES, GOLDEN, MODEL, MODEL_DATA, Workspace


class Place:
    """A request, a workspace with a sound hand-over, and the folder that is the repository's prefix."""

    def __init__(self, root: Path) -> None:
        self.request: ExportRequest = file_request(root, b"a checkpoint")
        self.workspace = Workspace(root / "work")
        self.prefix = root / "repository" / "vision" / "digits" / f"1-{REVISION}"
        hand_over(self.workspace)

    @property
    def output(self) -> Path:
        return self.workspace.output

    @property
    def proof(self) -> Path:
        return self.workspace.proof

    def publish(self) -> Summary:
        return publish(self.request, self.workspace, {})

    def delete_request(self) -> DeleteRequest:
        return DeleteRequest(owner=OWNER, artifact_revision=REVISION, destination=self.request.destination)

    def files(self) -> set[str]:
        return set(FileStore(self.prefix).sizes())

    def visible(self) -> bool:
        return published(FileStore(self.prefix), OWNER, REVISION) is not None

    def download(self, summary: Summary, target: Path) -> None:
        assert summary.artifact_digest
        download(Location(uri=self.request.destination.uri), summary.artifact_digest, target, {})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


ALL = {
    "manifest.json",
    "claim.json",
    "golden/golden.npz",
    "report.html",
    "model/digits/config.pbtxt",
    "model/digits/1/model.onnx",
}


def test_what_was_published_comes_back_byte_by_byte(place: Place, tmp_path: Path) -> None:
    summary = place.publish()
    assert summary.outcome is Outcome.PUBLISHED
    assert place.files() == ALL
    assert summary.artifact_uri == place.request.destination.uri

    place.download(summary, tmp_path / "pod")
    pod = tmp_path / "pod"
    assert (pod / "models/digits/1/model.onnx").read_bytes() == (place.output / MODEL).read_bytes()
    assert (pod / "golden/golden.npz").read_bytes() == (place.output / GOLDEN).read_bytes()
    assert 'name: "digits"' in (pod / "models/digits/config.pbtxt").read_text()
    assert sorted(path.name for path in pod.iterdir()) == ["golden", "manifest.json", "models"]


def test_labels_and_the_warm_ups_sample_lie_where_the_config_says(place: Place, tmp_path: Path) -> None:
    labels = [f"digit {n}" for n in range(10)]
    place.request = file_request(tmp_path, b"a checkpoint", triton={"maxBatchSize": 8, "labels": labels, "warmup": True})
    place.download(place.publish(), tmp_path / "pod")
    model = tmp_path / "pod/models/digits"
    config = parse_config((model / "config.pbtxt").read_text())
    assert (model / config.output[0].label_filename).read_text().splitlines() == labels
    sample = golden().inputs["image"][0]
    for warmup in config.model_warmup:
        (tensor,) = warmup.inputs.values()
        assert list(tensor.dims) == list(sample.shape)
        assert (model / "warmup" / tensor.input_data_file).read_bytes() == sample.tobytes()


def test_overrides_that_cannot_be_merged_are_refused_before_anything_is_fetched(place: Place, tmp_path: Path) -> None:
    place.request = file_request(tmp_path, b"a checkpoint", triton={"maxBatchSize": 8, "configOverrides": 'name: "x"'})
    with pytest.raises(StepFailed, match="may not set name"):
        fetch(place.request, place.workspace, {})
    assert not place.workspace.checkpoint.exists()


def test_equal_content_has_an_equal_digest_wherever_and_whenever(place: Place, tmp_path: Path) -> None:
    assert place.publish().artifact_digest == Place(tmp_path / "elsewhere").publish().artifact_digest


def test_a_second_publish_changes_nothing_and_says_so(place: Place) -> None:
    first = place.publish()
    before = {path: path.stat().st_mtime_ns for path in place.prefix.rglob("*")}
    (place.output / MODEL).write_bytes(b"another export of the same request")
    second = place.publish()
    assert second.outcome is Outcome.ALREADY_PUBLISHED
    assert second.artifact_digest == first.artifact_digest
    assert {path: path.stat().st_mtime_ns for path in place.prefix.rglob("*")} == before


def test_fetch_finds_the_published_artefact_and_spares_the_other_steps(place: Place) -> None:
    digest = place.publish().artifact_digest
    place.request = place.request.model_copy(
        update={"checkpoint": place.request.checkpoint.model_copy(update={"uri": "file:///nowhere"})}
    )
    fetch(place.request, place.workspace, {})
    assert not place.workspace.checkpoint.exists()
    done = place.workspace.published()
    assert done is not None
    assert (done.outcome, done.artifact_digest) == (Outcome.ALREADY_PUBLISHED, digest)


def test_a_published_artefact_that_lost_a_file_is_published_again(place: Place) -> None:
    digest = place.publish().artifact_digest
    (place.prefix / "model/digits/1/model.onnx").unlink()
    fetch(place.request, place.workspace, {})
    assert place.workspace.published() is None
    summary = place.publish()
    assert (summary.outcome, summary.artifact_digest) == (Outcome.PUBLISHED, digest)
    assert place.files() == ALL


def test_a_half_published_prefix_is_replaced_and_nothing_of_it_stays(place: Place) -> None:
    stray = place.prefix / "model/digits/1/model.onnx.data"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"left over")
    (place.prefix / "golden").mkdir()
    (place.prefix / "golden/golden.npz").write_bytes(b"half")
    place.publish()
    assert place.files() == ALL
    assert (place.prefix / "golden/golden.npz").read_bytes() == (place.output / GOLDEN).read_bytes()


@pytest.mark.parametrize("changes", range(5))
def test_a_publish_that_dies_anywhere_shows_nothing_and_the_next_one_finishes(
    place: Place, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = DyingStore(place.prefix, changes)
    with monkeypatch.context() as patch:
        patch.setattr(publish_step, "open_store", lambda *_: dying)
        with pytest.raises(Killed):
            place.publish()
    assert len(dying.done) == changes
    assert not place.visible()
    assert place.publish().outcome is Outcome.PUBLISHED
    assert place.files() == ALL


def test_the_claim_goes_first_and_the_manifest_last(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DyingStore(place.prefix, 100)
    monkeypatch.setattr(publish_step, "open_store", lambda *_: store)
    place.publish()
    assert store.done[0] == "put claim.json"
    assert store.done[-1] == "put manifest.json"
    assert len(store.done) == len(ALL)


def test_a_repair_takes_the_manifest_away_before_anything_else(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.publish()
    (place.prefix / "model/digits/1/model.onnx").unlink()
    store = DyingStore(place.prefix, 100)
    monkeypatch.setattr(publish_step, "open_store", lambda *_: store)
    place.publish()
    assert store.done[0] == "delete manifest.json"


@pytest.mark.parametrize("with_manifest", [True, False], ids=["published", "half-published"])
def test_what_belongs_to_another_is_never_touched(place: Place, with_manifest: bool) -> None:
    foreign = place.request.model_copy(update={"owner": STRANGER})
    publish(foreign, place.workspace, {})
    if not with_manifest:
        (place.prefix / "manifest.json").unlink()
    before = {path: path.read_bytes() for path in place.prefix.rglob("*") if path.is_file()}
    steps: list[Callable[[], object]] = [place.publish, lambda: delete(place.delete_request(), {})]
    if with_manifest:
        steps.append(lambda: fetch(place.request, place.workspace, {}))
    for step in steps:
        with pytest.raises(StepFailed, match="somebody-else") as caught:
            step()
        assert caught.value.reason is Reason.PREFIX_OWNED_BY_ANOTHER
        assert not caught.value.reason.retryable
    assert {path: path.read_bytes() for path in place.prefix.rglob("*") if path.is_file()} == before


def test_another_revision_under_the_same_prefix_is_another_owner(place: Place) -> None:
    place.publish()
    other = place.request.model_copy(update={"artifact_revision": "ffffffff"})
    with pytest.raises(StepFailed, match=r"PrefixOwnedByAnother.*0123abcd"):
        publish(other, place.workspace, {})


def test_a_manifest_that_cannot_be_read_is_left_for_a_human(place: Place) -> None:
    place.prefix.mkdir(parents=True)
    (place.prefix / "manifest.json").write_text("{}")
    for step in (place.publish, lambda: delete(place.delete_request(), {})):
        with pytest.raises(StepFailed, match=r"ArtifactCorrupt.*by hand"):
            step()
    assert (place.prefix / "manifest.json").read_text() == "{}"


def _link(place: Place) -> None:
    target = place.output.parent / "secret"
    target.write_bytes(b"secret")
    (place.output / MODEL).unlink()
    (place.output / MODEL).symlink_to(target)


def _hard_link(place: Place) -> None:
    (place.output / MODEL).unlink()
    (place.output.parent / "copy").write_bytes(b"secret")
    os.link(place.output.parent / "copy", place.output / MODEL)


def _fifo(place: Place) -> None:
    (place.output / MODEL).unlink()
    os.mkfifo(place.output / MODEL)


def _folder(place: Place) -> None:
    (place.output / "more").mkdir()


def _missing(place: Place) -> None:
    (place.output / GOLDEN).unlink()


def _empty(place: Place) -> None:
    (place.output / MODEL).write_bytes(b"")


def _huge(place: Place) -> None:
    os.truncate(place.proof / FIGURES, 2**40)


def _linked_data(place: Place) -> None:
    (place.output / MODEL_DATA).symlink_to("/etc/passwd")


def _endless_data(place: Place) -> None:
    (place.output / MODEL_DATA).touch()
    os.truncate(place.output / MODEL_DATA, 2**40)


def _config(place: Place) -> None:
    (place.output / "config.pbtxt").write_text('backend: "python"')


def _accuracy(asked: bool = True, measured: bool = True, **changes: object) -> Callable[[Place], None]:
    """Figures of an accuracy gate, sound but for the changes."""
    gate = AccuracyGate.model_validate({"dataset": {"uri": "s3://data/test.npz", "sha256": "d" * 64}, "minimum": "0.95"})

    def change(place: Place) -> None:
        verification = place.request.verification.model_copy(update={"accuracy": gate if asked else None})
        place.request = place.request.model_copy(update={"verification": verification})
        figures = json.loads((place.proof / FIGURES).read_text())
        if measured:
            judged = json.loads(judge_accuracy(tally(100, 97, 98), gate).to_json())
            if changes.get("verdict") == "Failed":
                judged = json.loads(judge_accuracy(tally(100, int(str(changes["correct"])), 98), gate).to_json())
            figures["accuracy"] = judged | changes
        if asked:
            (place.output / ANSWERS).write_bytes(b"read by prove alone")
        (place.proof / FIGURES).write_text(json.dumps(figures))

    return change


def _figures(**changes: object) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.proof / FIGURES
        content = json.loads(path.read_text())
        content["parity"].update(changes)
        path.write_text(json.dumps(content))

    return change


def _golden(**arrays: np.ndarray) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        good = golden()
        outputs = {"logits": arrays.get("logits", good.outputs["logits"])}
        inputs = {"image": arrays.get("image", good.inputs["image"])}
        save_golden(replace(good, inputs=inputs, outputs=outputs), place.output / GOLDEN)

    return change


REJECTED: list[tuple[str, Callable[[Place], None], str]] = [
    ("a symbolic link in place of the model", _link, "not a regular file"),
    ("a hard link in place of the model", _hard_link, "not a regular file of its own"),
    ("a pipe that would hang the reader", _fifo, "not a regular file"),
    ("a symbolic link in place of the weights beside the model", _linked_data, "model.onnx.data is not a regular file"),
    ("more weights than any checkpoint has", _endless_data, "model.onnx.data has"),
    ("a folder more", _folder, "unexpected \\['more'\\]"),
    ("a config of convert's own", _config, "config.pbtxt"),
    ("a file less", _missing, "missing \\['golden.npz'\\]"),
    ("an empty model", _empty, "0 bytes"),
    ("figures larger than memory", _huge, "figures.json has"),
    ("an accuracy that nobody asked for", _accuracy(asked=False), "does not ask"),
    ("no accuracy where one is asked for", _accuracy(measured=False), "was not measured"),
    ("an accuracy below its minimum", _accuracy(correct=94, verdict="Failed"), "0.0100 below the minimum"),
    ("a forged verdict over an accuracy below its minimum", _accuracy(correct=94), "not that of its figures"),
    ("an accuracy on other data", _accuracy(datasetSha256="e" * 64), "not that of its figures"),
    ("more right answers than samples", _accuracy(correct=101), "more correct answers"),
    ("a verdict that is not Passed", _figures(verdict="Failed"), "do not pass"),
    ("a forged verdict beside a large relative error", _figures(maxRelativeError=0.5), "do not pass"),
    ("a forged verdict beside a large absolute error", _figures(maxAbsoluteError=1e9), "do not pass"),
    ("figures that are not there", _figures(maxAbsoluteError=None), "do not pass"),
    ("figures that are no numbers", _figures(maxAbsoluteError="NaN"), "figures.json"),
    ("fields that the contract lacks", _figures(note="trust me"), "figures.json"),
    ("golden answers that are all the same", _golden(logits=np.ones((4, 10), np.float32)), "prove nothing"),
    ("golden answers that are NaN", _golden(logits=np.full((4, 10), np.nan, np.float32)), "prove nothing"),
    ("golden answers of another shape", _golden(logits=np.ones((4, 11), np.float32)), r"\[4, 11\]"),
    ("golden inputs of another shape", _golden(image=np.ones((4, 28, 28), np.float32)), r"\[4, 28, 28\]"),
    ("more answers than samples", _golden(logits=np.ones((5, 10), np.float32)), "outputs/logits 5"),
    (
        "a single sample",
        _golden(image=np.ones((1, 1, 28, 28), np.float32), logits=np.ones((1, 10), np.float32)),
        "1 golden samples",
    ),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in REJECTED], ids=[case[0] for case in REJECTED])
def test_a_hand_over_is_rejected_with(change: Callable[[Place], None], says: str, place: Place) -> None:
    change(place)
    with pytest.raises(StepFailed, match=says) as caught:
        place.publish()
    assert caught.value.reason is Reason.OUTPUT_REJECTED
    assert not place.prefix.exists(), "nothing may be uploaded of what is rejected"


def _tamper(key: str, content: bytes) -> Callable[[Place], None]:
    return lambda place: (place.prefix / key).write_bytes(content) and None


@pytest.mark.parametrize(
    ("change", "says", "reason"),
    [
        (_tamper("model/digits/1/model.onnx", b"evil" * 1000), "sha256", Reason.ARTIFACT_CORRUPT),
        (_tamper("model/digits/1/model.onnx", b"short"), "sha256", Reason.ARTIFACT_CORRUPT),
        (_tamper("model/digits/config.pbtxt", b"x" * 1000), "more than", Reason.OBJECT_TOO_LARGE),
        (_tamper("manifest.json", b"{}"), "not the pinned", Reason.ARTIFACT_CORRUPT),
        (lambda place: (place.prefix / "golden/golden.npz").unlink(), "not there", Reason.OBJECT_NOT_FOUND),
        (lambda place: (place.prefix / "manifest.json").unlink(), "never published whole", Reason.OBJECT_NOT_FOUND),
    ],
    ids=["other bytes", "fewer bytes", "more bytes", "another manifest", "a lost file", "a lost manifest"],
)
def test_a_pod_does_not_start_from(
    change: Callable[[Place], None], says: str, reason: Reason, place: Place, tmp_path: Path
) -> None:
    summary = place.publish()
    change(place)
    with pytest.raises(StepFailed, match=says) as caught:
        place.download(summary, tmp_path / "pod")
    assert caught.value.reason is reason
    assert not (tmp_path / "pod" / "manifest.json").exists()


def test_delete_erases_ours_and_a_second_time_nothing(place: Place) -> None:
    place.publish()
    assert delete(place.delete_request(), {}) == len(ALL)
    assert place.files() == set()
    assert delete(place.delete_request(), {}) == 0


@pytest.mark.parametrize("changes", range(5))
def test_a_delete_that_dies_anywhere_is_finished_by_the_next(place: Place, changes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place.publish()
    dying = DyingStore(place.prefix, changes)
    with monkeypatch.context() as patch:
        patch.setattr(delete_step, "open_store", lambda *_: dying)
        with pytest.raises(Killed):
            delete(place.delete_request(), {})
    assert place.visible() == (changes == 0), "the first thing erased is what makes the rest visible"
    delete(place.delete_request(), {})
    assert place.files() == set()


def test_files_that_nobody_claims_are_not_deleted(place: Place) -> None:
    stray = place.prefix / "model/digits/1/model.onnx"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"somebody's")
    assert delete(place.delete_request(), {}) == 0
    assert stray.exists()


def test_the_manifest_and_the_claim_carry_no_time() -> None:
    """Equal content must have an equal digest: a field such as `created` would undo that."""
    assert {"created", "time", "seconds"}.isdisjoint(Manifest.model_fields.keys() | Claim.model_fields.keys())


def test_an_accuracy_that_passes_or_only_warns_is_published_with_its_figures(place: Place) -> None:
    _accuracy(correct=94, verdict="Failed")(place)
    gate = place.request.verification.accuracy
    assert gate is not None
    warned = gate.model_copy(update={"on_failure": OnFailure.WARN})
    verification = place.request.verification.model_copy(update={"accuracy": warned})
    place.request = place.request.model_copy(update={"verification": verification})
    summary = place.publish()
    assert summary.accuracy is not None
    assert (summary.accuracy.correct, summary.accuracy.verdict) == (94, Verdict.FAILED)
    manifest = Manifest.from_json((place.prefix / "manifest.json").read_bytes())
    assert manifest.accuracy is not None
    assert manifest.accuracy.message.endswith("0.0100 below the minimum of 0.95")
