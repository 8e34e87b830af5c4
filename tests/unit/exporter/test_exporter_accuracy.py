"""The accuracy gate and the data sets that it reads: exact at its limits, and no broken or hostile file gets past the reader."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exporter_builders import request, tally
from pydantic import ValidationError

from perch_exporter.accuracy import Tally, judge_accuracy
from perch_exporter.contract import AccuracyGate, Confused, Reason, Verdict
from perch_exporter.datasets import open_data_set
from perch_exporter.failure import StepFailed
from perch_exporter.samples import surest

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((10, 1, 28, 28)).astype(np.float32)
LABELS = np.arange(10)


def gate(**limits: str) -> AccuracyGate:
    return AccuracyGate.model_validate({"dataset": {"uri": "s3://data/test.npz", "sha256": "d" * 64}, **limits})


@pytest.mark.parametrize(
    ("found", "limits", "passes"),
    [
        (tally(100, 95, 95), {"minimum": "0.95"}, True),
        (tally(100, 94, 95), {"minimum": "0.95"}, False),
        # 0.29 × 100 is 28.999… in binary: a limit is met exactly or not at all.
        (tally(100, 29, 29), {"minimum": "0.29"}, True),
        (tally(1000, 990, 1000), {"maximumDrop": "0.01"}, True),
        (tally(1000, 989, 1000), {"maximumDrop": "0.01"}, False),
        (tally(1000, 1000, 900), {"maximumDrop": "0"}, True),
        (tally(1000, 999, 1000), {"maximumDrop": "0"}, False),
        (tally(1, 0, 0), {"minimum": "0"}, True),
        (tally(1, 1, 1), {"minimum": "1"}, True),
    ],
)
def test_a_limit_is_compared_over_whole_samples(found: Tally, limits: dict[str, str], passes: bool) -> None:
    assert (judge_accuracy(found, gate(**limits)).verdict is Verdict.PASSED) is passes


def test_the_message_says_by_how_much_each_limit_is_missed() -> None:
    judged = judge_accuracy(tally(1000, 900, 960), gate(minimum="0.95", maximumDrop="0.01"))
    assert judged.message == (
        "accuracy 0.9000 on 1,000 samples, the checkpoint's is 0.9600: 0.0500 below the minimum of 0.95 and a drop of 0.0600, "
        "allowed is 0.01"
    )


def test_the_tally_counts_batch_by_batch_and_names_what_is_confused() -> None:
    found = Tally(10)
    found.add(LABELS, LABELS, LABELS)
    found.add(np.array([3, 3, 3, 7]), np.array([5, 5, 3, 1]), np.array([3, 3, 3, 1]))
    assert (found.of_class[3], found.correct_of_class[3]) == (4, 2)
    assert (found.samples, found.correct, found.checkpoint_correct) == (14, 11, 13)
    assert found.worst() == (Confused(label=3, predicted=5, count=2), Confused(label=7, predicted=1, count=1))


def test_figures_that_count_more_than_there_is_are_no_figures() -> None:
    good = judge_accuracy(tally(10, 9, 9), gate(minimum="0.5")).model_dump()
    with pytest.raises(ValidationError, match="more correct answers"):
        type(judge_accuracy(tally(10, 9, 9), gate(minimum="0.5"))).model_validate({**good, "correct": 11})


def test_the_surest_samples_of_each_class_are_chosen() -> None:
    scores = np.array([[9, 0, 0], [1, 0, 0], [0, 1, 0], [0, 5, 0], [0, 0, 2], [8, 0, 0]], np.float32)
    assert list(surest(scores, 3)) == [0, 3, 4]
    assert list(surest(scores, 4)) == [0, 3, 4, 5]
    assert list(surest(scores, 6)) == [0, 1, 2, 3, 4, 5]


# --- reading data sets ---------------------------------------------------------------------------------------------------


def test_a_data_set_is_read_in_batches_compressed_or_not(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "set.npz", image=IMAGES, labels=LABELS, more=np.zeros(3))
        found = open_data_set(tmp_path / "set.npz", request(), labelled=True)
        parts = list(found.batches(4))
        assert found.samples == 10
        assert [len(inputs["image"]) for inputs, _ in parts] == [4, 4, 2]
        assert np.array_equal(np.concatenate([inputs["image"] for inputs, _ in parts]), IMAGES)
        assert np.concatenate([labels for _, labels in parts]).tolist() == LABELS.tolist()


def test_samples_are_picked_from_all_over_the_set(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "set.npz", image=np.arange(300, dtype=np.float32).reshape(300, 1, 1, 1) + np.zeros((1, 1, 28, 28), np.float32)
    )
    found = open_data_set(tmp_path / "set.npz", request())
    assert found.pick(4).inputs["image"][:, 0, 0, 0].tolist() == [0, 99, 199, 299]
    assert len(found.pick(1000).inputs["image"]) == 300


def test_without_labels_only_the_inputs_are_needed(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", image=IMAGES)
    ((_, labels),) = open_data_set(tmp_path / "set.npz", request()).batches(10)
    assert len(labels) == 0


class Touch:
    """Were it unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.path), "w"))  # type: ignore[return-value]


def bomb(path: Path) -> None:
    """A header that promises far more than there is."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (9_000_000, 1, 28, 28)})
    labels = io.BytesIO()
    np.lib.format.write_array_header_1_0(labels, {"descr": "<i8", "fortran_order": False, "shape": (9_000_000,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", head.getvalue() + bytes(3136))
        archive.writestr("labels.npy", labels.getvalue() + bytes(80))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def zipped(path: Path, image: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", image)
        archive.writestr("labels.npy", npy(LABELS))


def cut(path: Path) -> None:
    np.savez(path, image=IMAGES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:-500])


def damaged(path: Path) -> None:
    np.savez_compressed(path, image=IMAGES, labels=LABELS)
    content = bytearray(path.read_bytes())
    content[5000:9000] = bytes(4000)
    path.write_bytes(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no zip": (lambda path: path.write_bytes(b"not a zip"), "no npz"),
    "empty": (lambda path: path.write_bytes(b""), "no npz"),
    "cut off": (cut, "no npz"),
    "damaged": (damaged, "CRC"),
    "no labels": (lambda path: np.savez(path, image=IMAGES), "no array labels; it has image"),
    "another name": (lambda path: np.savez(path, x=IMAGES, labels=LABELS), "no array image; it has labels, x"),
    "another shape": (lambda path: np.savez(path, image=IMAGES[:, 0], labels=LABELS), r"shape \[10, 28, 28\]"),
    "another type": (lambda path: np.savez(path, image=IMAGES.astype(np.float64), labels=LABELS), "float64"),
    "too few labels": (lambda path: np.savez(path, image=IMAGES, labels=LABELS[:4]), "10 image, 4 labels"),
    "no samples": (lambda path: np.savez(path, image=IMAGES[:0], labels=LABELS[:0]), "0 image"),
    "labels as figures": (lambda path: np.savez(path, image=IMAGES, labels=LABELS * 0.5), "whole number"),
    "a class too many": (lambda path: np.savez(path, image=IMAGES, labels=LABELS + 1), "from 1 to 10"),
    "a class below 0": (lambda path: np.savez(path, image=IMAGES, labels=LABELS - 1), "from -1 to 8"),
    "Fortran order": (lambda path: np.savez(path, image=np.asfortranarray(IMAGES), labels=LABELS), "Fortran order"),
    "more promised than there": (bomb, "and holds 3,136 bytes"),
    "a picture of NaN": (lambda path: np.savez(path, image=IMAGES * np.nan, labels=LABELS), "NaN or Inf"),
    "big-endian numbers": (lambda path: np.savez(path, image=IMAGES.astype(">f4"), labels=LABELS), ">f4"),
    "a header without sizes": (lambda path: zipped(path, header("(-10, -1, 28, 28)") + bytes(31360)), "holds 31,360 bytes"),
    "a header of code": (lambda path: zipped(path, header("__import__('os').getpid()")), "ValueError"),
    "a member that is no array": (lambda path: zipped(path, b"x"), "ValueError"),
    "more in it than its header says": (lambda path: zipped(path, npy(IMAGES) + bytes(2**26)), "and holds 67,140,224 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_data_set_is_refused_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    make, words = BROKEN[name]
    make(tmp_path / "set.npz")
    with pytest.raises(StepFailed, match=words) as failed:
        for _ in open_data_set(tmp_path / "set.npz", request(), labelled=True).batches(4):
            pass
    assert failed.value.reason is Reason.DATASET_UNREADABLE


def test_nothing_in_a_data_set_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    np.savez(tmp_path / "set.npz", image=np.array([Touch(trap)], dtype=object), labels=LABELS[:1])
    with pytest.raises(StepFailed, match="Python objects, which are not unpickled"):
        open_data_set(tmp_path / "set.npz", request(), labelled=True)
    assert not trap.exists()
    # The control: numpy's own reader, told to unpickle, springs the trap.
    with (
        np.load(tmp_path / "set.npz", allow_pickle=True) as file,
        pytest.raises((TypeError, AttributeError, pickle.UnpicklingError)),
    ):
        file["image"].item().no_such_attribute  # noqa: B018
    assert trap.exists()
