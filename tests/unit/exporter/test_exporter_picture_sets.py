"""Data sets of pictures: what they are labelled by, and every archive that is none."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import PICTURES, request
from PIL import Image

from perch_exporter.contract import ExportRequest, Reason
from perch_exporter.datasets import open_data_set
from perch_exporter.failure import StepFailed

ASKED = request(**PICTURES)


def picture(grey: int, kind: str = "PNG") -> bytes:
    packed = io.BytesIO()
    Image.new("L", (40, 30), grey).save(packed, kind)
    return packed.getvalue()


def zipped(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tarred(path: Path, files: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


BY_NAME = {"set/digit 3/a.png": picture(30), "set/digit 0/b.jpg": picture(200, "JPEG"), "set/digit 3/c.PNG": picture(90)}


@pytest.mark.parametrize("write", [zipped, tarred, lambda path, files: tarred(path, files, "w:gz")], ids=["zip", "tar", "tar.gz"])
def test_pictures_are_read_with_their_folders_as_labels(write: Callable[..., None], tmp_path: Path) -> None:
    write(tmp_path / "set", {**BY_NAME, "set/.DS_Store": b"x", "__MACOSX/set/a.png": b"x"})
    found = open_data_set(tmp_path / "set", ASKED, labelled=True)
    assert found.samples == 3
    parts = list(found.batches(2))
    assert [len(inputs["image"]) for inputs, _ in parts] == [2, 1]
    images = np.concatenate([inputs["image"] for inputs, _ in parts])
    assert images.shape == (3, 1, 28, 28)
    assert np.concatenate([labels for _, labels in parts]).tolist() == [3, 0, 3], "in the order of the archive"
    assert [round(float(image.mean()) * 255) for image in images] == [30, 200, 90]
    picked = found.pick(2)
    assert len(picked.pictures) == 2
    assert picked.pictures[0] == BY_NAME["set/digit 3/a.png"], "the very bytes"
    assert np.array_equal(picked.inputs["image"][0], images[0])


def test_a_compressed_tar_in_any_order_is_read_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back in a gzip means to inflate it from its start, and by name a tar is searched: either is quadratic."""
    count = 40
    tarred(tmp_path / "set", {f"{n % 10}/{count - n:02}.png": picture(n) for n in range(count)}, "w:gz")
    back, searched = [], []
    seek, search = gzip.GzipFile.seek, tarfile.TarFile.getmember

    def watched(file: Any, offset: int, whence: int = 0) -> int:
        back.extend([offset] if whence == 0 and offset < seek(file, 0, 1) else [])
        return seek(file, offset, whence)

    monkeypatch.setattr(gzip.GzipFile, "seek", watched)
    monkeypatch.setattr(tarfile.TarFile, "getmember", lambda file, name: searched.append(name) or search(file, name))
    found = open_data_set(tmp_path / "set", ASKED, labelled=True)
    labels = [int(label) for _, labels in found.batches(3) for label in labels]
    assert labels == [n % 10 for n in range(count)]
    assert len(found.pick(20).pictures) == 20
    assert not searched
    assert len(back) <= 3, "once for each time that it is opened"


def test_folders_may_be_numbers_or_as_many_as_classes(tmp_path: Path) -> None:
    zipped(tmp_path / "numbers", {"7/a.png": picture(1), "2/b.png": picture(2)})
    ((_, labels),) = open_data_set(tmp_path / "numbers", ASKED, labelled=True).batches(9)
    assert labels.tolist() == [7, 2]
    zipped(tmp_path / "all", {f"class-{n:02}/x.png": picture(n) for n in range(10)})
    ((_, labels),) = open_data_set(tmp_path / "all", ASKED, labelled=True).batches(99)
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        pytest.param(
            ["set/class-0/indoor/a.png", "set/class-0/outdoor/b.png", *(f"set/class-{n}/a.png" for n in range(1, 10))],
            [0, 0, *range(1, 10)],
            id="nested, as ImageFolder has them",
        ),
        pytest.param([f"a/b/{n}/x.png" for n in range(10)], list(range(10)), id="numbers in the order of their text"),
        pytest.param(["val/3/x.png", "val/0/y.png"], [3, 0], id="one part of a set, which is its root"),
        pytest.param(["val/digit 3/x/y/z.png", "val/digit 0/y.png"], [3, 0], id="labels that are known, nested"),
    ],
)
def test_a_pictures_class_is_the_first_folder_below_the_root(names: list[str], labels: list[int], tmp_path: Path) -> None:
    zipped(tmp_path / "set", {name: picture(7 * place) for place, name in enumerate(names)})
    ((_, found),) = open_data_set(tmp_path / "set", ASKED, labelled=True).batches(99)
    assert found.tolist() == labels


def test_folders_whose_order_could_mean_two_things_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name, numbers in (("twelve", range(12)), ("from one", range(1, 13))):
        zipped(tmp_path / name, {f"{n}/a.png": picture(n) for n in numbers})
        twelve = ASKED.outputs[0].model_copy(update={"shape": (12,)})
        nameless = ASKED.triton.model_copy(update={"labels": None})
        asked = ASKED.model_copy(update={"outputs": (twelve,), "triton": nameless})
        with pytest.raises(StepFailed, match=r"list the folders' names in triton\.labels, in the order of the 12 outputs"):
            open_data_set(tmp_path / name, asked, labelled=True)
        # The order that the network was trained with, said in words.
        named = asked.triton.model_copy(update={"labels": tuple(sorted(map(str, numbers)))})
        told = open_data_set(tmp_path / name, asked.model_copy(update={"triton": named}), labelled=True)
        ((_, labels),) = told.batches(99)
        assert sorted(labels.tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        pytest.param(["set/train/3/a.png", "set/val/3/a.png"], "train and val", id="above the classes"),
        pytest.param(["3/train/a.png", "3/val/a.png", "4/val/a.png"], "train and val", id="below the classes"),
        pytest.param(["set/Train/3/a.png", "set/Test/3/a.png", "set/other/a.png"], "Test and Train", id="beside something else"),
        pytest.param(["set/train/3/a.png", "set/train/4/a.png"], "train", id="and nothing else"),
    ],
)
def test_a_set_that_holds_the_pictures_of_training_too_is_refused(names: list[str], says: str, tmp_path: Path) -> None:
    zipped(tmp_path / "set", {name: picture(place) for place, name in enumerate(names)})
    with pytest.raises(StepFailed, match=rf"lie below {says}, .* pack the folder of one part alone"):
        open_data_set(tmp_path / "set", ASKED, labelled=True)
    assert open_data_set(tmp_path / "set", ASKED).samples == len(names), "for parity and calibration they serve"


@pytest.mark.parametrize("labels", [None, ("bus", "car", "train")])
def test_pictures_of_trains_are_a_class_like_others(labels: tuple[str, ...] | None, tmp_path: Path) -> None:
    zipped(tmp_path / "set", {f"{name}/a.png": picture(place) for place, name in enumerate(("bus", "train", "car"))})
    ((_, found),) = open_data_set(tmp_path / "set", of_classes(3, labels), labelled=True).batches(9)
    assert found.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("classes", "folders", "labels"),
    [
        pytest.param(12, ["2", "11"], None, id="some of twelve"),
        pytest.param(102, [str(n) for n in range(1, 103)], None, id="1 to 102"),
        pytest.param(1000, ["0", "17"], None, id="two of a thousand"),
        pytest.param(12, [f"{n:02}" for n in range(12)], list(range(12)), id="00 to 11"),
        pytest.param(12, ["11", "02"], [11, 2], id="11 and 02"),
        pytest.param(10, ["9", "1"], [9, 1], id="9 and 1 of ten"),
    ],
)
def test_numbers_for_folders_mean_classes_where_their_text_sorts_as_they_do(
    classes: int, folders: list[str], labels: list[int] | None, tmp_path: Path
) -> None:
    zipped(tmp_path / "set", {f"{folder}/a.png": picture(place % 256) for place, folder in enumerate(folders)})
    if labels is None:
        with pytest.raises(StepFailed, match=r"may mean two things: .*, from 0 on, in \d digits or more"):
            open_data_set(tmp_path / "set", of_classes(classes, None), labelled=True)
    else:
        ((_, found),) = open_data_set(tmp_path / "set", of_classes(classes, None), labelled=True).batches(999)
        assert found.tolist() == labels


def of_classes(count: int, labels: tuple[str, ...] | None) -> ExportRequest:
    outputs = (ASKED.outputs[0].model_copy(update={"shape": (count,)}),)
    return ASKED.model_copy(update={"outputs": outputs, "triton": ASKED.triton.model_copy(update={"labels": labels})})


def test_without_labels_a_flat_folder_will_do(tmp_path: Path) -> None:
    zipped(tmp_path / "set", {"a.png": picture(1), "b.png": picture(2)})
    ((inputs, labels),) = open_data_set(tmp_path / "set", ASKED).batches(9)
    assert (len(inputs["image"]), len(labels)) == (2, 0)


def linked(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("3/passwd.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("3/bomb.png", bytes(2**26))


def twice(path: Path) -> None:
    tarred(path, {"3/a.png": picture(1)})
    with tarfile.open(path, "a") as archive:
        entry = tarfile.TarInfo("3/a.png")
        entry.size = len(picture(2))
        archive.addfile(entry, io.BytesIO(picture(2)))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no archive": (lambda path: path.write_bytes(b"no archive"), "ReadError"),
    "nothing in it": (lambda path: zipped(path, {}), "no pictures"),
    "a text among them": (lambda path: zipped(path, {"3/read.txt": b"me"}), "read.txt is neither JPEG nor PNG"),
    "a text that says it is a picture": (lambda path: zipped(path, {"3/a.png": b"text"}), "3/a.png: it is neither"),
    "one that is cut off": (lambda path: zipped(path, {"3/a.png": picture(1)[:50]}), "3/a.png: it"),
    "a link to a file of the system": (linked, "no pictures"),
    "more than it says": (bomb, "67,108,864 bytes, more than"),
    "a name twice": (twice, "a name twice"),
    "folders that are no classes": (lambda path: zipped(path, {"cat/a.png": picture(1)}), r"in 1 folders \(cat\)"),
    "no folders": (lambda path: zipped(path, {"a.png": picture(1)}), r"in 1 folders \(none\)"),
    "a class too many": (lambda path: zipped(path, {"10/a.png": picture(1)}), "folder 10 is beyond the classes 0 to 9"),
    "an archive in an archive": (lambda path: zipped(path, {"3/a.zip": b"PK"}), "a.zip is neither"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_archive_is_refused_that_has(name: str, tmp_path: Path) -> None:
    make, words = BROKEN[name]
    make(tmp_path / "set")
    with pytest.raises(StepFailed, match=words) as failed:
        for _ in open_data_set(tmp_path / "set", ASKED, labelled=True).batches(4):
            pass
    assert failed.value.reason is Reason.DATASET_UNREADABLE


def test_pictures_are_no_data_set_where_clients_send_tensors(tmp_path: Path) -> None:
    zipped(tmp_path / "set", BY_NAME)
    with pytest.raises(StepFailed, match="pictures are read where the version has preprocessing"):
        open_data_set(tmp_path / "set", request())


def test_a_path_that_leads_out_is_a_name_and_nothing_more(tmp_path: Path) -> None:
    zipped(tmp_path / "set", {"../../3/a.png": picture(1)})
    found = open_data_set(tmp_path / "set", ASKED, labelled=True)
    before: Any = sorted(path.name for path in tmp_path.iterdir())
    assert len(list(found.batches(4))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
