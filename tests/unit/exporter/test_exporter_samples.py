"""Golden samples: the same for the same revision, different among themselves, bounded, and never a pickle."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from exporter_builders import REVISION, golden, request

from perch_exporter.contract import DataType, Reason, TensorSpec
from perch_exporter.failure import StepFailed
from perch_exporter.samples import GOLDEN_LIMIT, Golden, data_type_of, load_golden, make_inputs, sample_count, save_golden


def spec(*shape: int, data_type: str = "FP32") -> TensorSpec:
    return TensorSpec(name="image", data_type=DataType(data_type), shape=shape)


def test_the_same_revision_gives_the_same_samples_and_another_gives_others() -> None:
    once, again = (make_inputs(request().inputs, REVISION, 4)["image"] for _ in range(2))
    other = make_inputs(request().inputs, "0123abce", 4)["image"]
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_samples_differ_in_what_survives_averaging() -> None:
    images = make_inputs([spec(3, 32, 32)], REVISION, 16)["image"]
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    assert np.ptp(images.mean(axis=(1, 2, 3))) > 0.5
    assert images.std(axis=(1, 2, 3)).max() > 2 * images.std(axis=(1, 2, 3)).min()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1, 1), (3, 5, 7), (3, -1, -1), (2, 3, 4, 5)])
def test_any_shape_has_samples(shape: tuple[int, ...]) -> None:
    images = make_inputs([spec(*shape)], REVISION, 5, dynamic=9)["image"]
    assert images.shape == (5, *(9 if size == -1 else size for size in shape))


@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 16), ((3, 224, 224), 13), ((3, -1, -1), 13), ((3, 512, 512), 4)])
def test_larger_inputs_have_fewer_samples(shape: tuple[int, ...], count: int) -> None:
    assert sample_count([spec(*shape)]) == count
    assert 4 * count * int(np.prod([224 if size == -1 else size for size in shape])) < GOLDEN_LIMIT / 2


@pytest.mark.parametrize(("gigas", "count"), [(0, 13), (4, 13), (8, 8), (31, 6), (10_000, 6)])
def test_a_network_that_takes_much_work_for_one_has_fewer_samples(gigas: int, count: int) -> None:
    assert sample_count([spec(3, 224, 224)], gigas * 10**9) == count


def test_large_inputs_and_much_work_together_leave_the_fewest() -> None:
    assert sample_count([spec(3, 512, 512)], 10**12) == 4


def test_inputs_too_large_for_any_samples_are_refused() -> None:
    with pytest.raises(StepFailed, match=r"ShapeMismatch.*do not fit"):
        sample_count([spec(3, 4096, 4096)])


def test_golden_comes_back_as_it_was_saved_and_saves_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1.npz", tmp_path / "2.npz"
    save_golden(golden(), first)
    loaded = load_golden(first)
    save_golden(loaded, second)
    assert first.read_bytes() == second.read_bytes()
    assert np.array_equal(loaded.outputs["logits"], golden().outputs["logits"])


def _npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return file.getvalue()


def _compressed() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{"inputs/image": np.zeros((2, 2**22), np.float32)})
    return file.getvalue()


def _zip(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _boasting() -> bytes:
    """An array's header that claims 4 TiB, before no data at all."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    return _zip("inputs/image.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "BadZipFile", id="an empty file"),
        pytest.param(b"not a zip", "BadZipFile", id="no zip"),
        pytest.param(_npz(inputs__image=np.array([{}, 1], dtype=object)), "allow_pickle=False", id="a pickled array"),
        pytest.param(_zip("inputs/image.npy", b"\x80\x04N."), "not an array of a known", id="a bare pickle"),
        pytest.param(_zip("inputs/image.npy", b"\x93NUMPY\x01\x00\xff\xff{"), "ValueError", id="a broken header"),
        pytest.param(_boasting(), "MemoryError|ValueError", id="a header that claims more than there is"),
        pytest.param(_npz(inputs__image=np.zeros(3, np.complex64)), "not an array of a known", id="another data type"),
        pytest.param(_npz(inputs__image=np.float32(3)), "dimension for samples", id="no samples' dimension"),
        pytest.param(_npz(secrets__image=np.zeros(3, np.float32)), "secrets/image", id="another group"),
        pytest.param(_npz(image=np.zeros(3, np.float32)), "neither of inputs", id="no group"),
        pytest.param(_npz(), "no inputs", id="nothing at all"),
        pytest.param(_npz(inputs__image=np.zeros(3, np.float32)), "no outputs", id="questions without answers"),
        pytest.param(
            _npz(inputs__image=np.zeros(3, np.float32), outputs__y=np.zeros(4, np.float32)),
            "inputs/image 3, outputs/y 4",
            id="more answers than samples",
        ),
        pytest.param(_compressed(), "compressed", id="what unpacks to more than it is"),
    ],
)
def test_golden_is_rejected_that_is(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(StepFailed, match=says) as caught:
        load_golden(path)
    assert caught.value.reason is Reason.OUTPUT_REJECTED


@pytest.mark.parametrize("data_type", list(DataType))
def test_inputs_are_of_the_type_that_is_asked_for_and_differ(data_type: str) -> None:
    array = make_inputs([spec(3, 8, 8, data_type=data_type)], REVISION, 6)["image"]
    assert data_type_of(array) == data_type
    assert array.shape == (6, 3, 8, 8)
    assert len({sample.tobytes() for sample in array}) == 6


@pytest.mark.parametrize("data_type", ["INT32", "INT64"])
def test_whole_numbers_are_digits(data_type: str) -> None:
    array = make_inputs([spec(50, data_type=data_type)], REVISION, 16)["image"]
    assert set(np.unique(array)) <= set(range(10))
    assert len(np.unique(array)) > 4


def test_golden_samples_keep_their_types(tmp_path: Path) -> None:
    kept = Golden({"x": np.zeros((2, 3), np.uint8)}, {"labels": np.arange(4).reshape(2, 2), "there": np.ones((2, 1), bool)})
    save_golden(kept, tmp_path / "golden.npz")
    loaded = load_golden(tmp_path / "golden.npz")
    assert {name: array.dtype for name, array in (loaded.inputs | loaded.outputs).items()} == {
        "x": np.uint8, "labels": np.int64, "there": bool
    }  # fmt: skip


def test_answers_that_take_too_much_are_called_by_what_they_are(tmp_path: Path) -> None:
    large = Golden({}, {"mask": np.zeros((9, GOLDEN_LIMIT // 32), np.float32)})
    with pytest.raises(StepFailed, match=r"the answers to 9 samples take [\d,]+ bytes, more than 33,554,432") as failed:
        save_golden(large, tmp_path / "calibrated.npz", "the answers to 9 samples")
    assert failed.value.reason is Reason.SHAPE_MISMATCH
