"""Data sets: samples, with labels or without, that somebody put into a bucket. Never a pickle, and nothing is unpacked to disk.

Two forms, told apart by what is in the file:

- numpy's npz (numpy.savez, compressed or not): one array for each input, [samples, *shape] in the input's data type, and where
  labels are needed one named `labels`, whole numbers from 0, [samples].
- Where the version takes pictures (`preprocessing`), a zip or tar of JPEGs and PNGs. Their labels are the first folders below the
  root, as torchvision's ImageFolder has it: a name of triton.labels, a class's number, or else the place among the sorted names,
  where there are as many folders as classes. Hidden files and macOS' own are passed over.

Both are read in batches from the archive as it lies there: a data set may be larger than memory, and what a compressed one
unpacks to never lies anywhere as a whole.
"""

from __future__ import annotations

import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from perch_exporter.contract import ExportRequest, Preprocessing, Reason, TensorSpec
from perch_exporter.failure import StepFailed
from perch_exporter.picture_samples import prepare_pictures
from perch_exporter.samples import NAMES, Array, Tensors, fits

LABELS = "labels"
FEWEST_SAMPLES = 4
FEWEST_CALIBRATION, MOST_CALIBRATION = 16, 128
_MOST_SAMPLES = 10_000_000
_PICKED_FROM, _PICK_BATCH = 10_000, 64
_LONGEST_HEADER = 10_000
_PICTURE_BYTES = 32 * 2**20
_MOST_PICTURES = 1_000_000
_PICTURES = (".jpg", ".jpeg", ".png")

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picked:
    """Some samples of a set, and the pictures that they were made of, where it has any."""

    inputs: Tensors
    pictures: tuple[bytes, ...] = ()


class DataSet(Protocol):
    """Each of these reads the file from its beginning, and raises DatasetUnreadable, which names what is wrong in it."""

    @property
    def samples(self) -> int: ...

    def batches(self, size: int) -> Iterator[tuple[Tensors, Labels]]:
        """All samples, `size` at a time: the inputs by name, and the labels, none where none were asked for."""

    def pick(self, count: int) -> Picked:
        """So many samples from all over the set: in a sorted one, neighbours are of one class."""


def open_data_set(path: Path, request: ExportRequest, *, labelled: bool = False) -> DataSet:
    """`labelled`: labels are needed, below the number of classes of the first output."""
    classes = request.outputs[0].shape[0] if labelled else None
    with _reading():
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith(".npy") for name in archive.namelist()):
                    return _open_arrays(path, request.inputs, classes)
        if request.preprocessing is None:
            raise _unreadable("it is no npz; pictures are read where the version has preprocessing")
        return _open_pictures(path, request, classes)


# --- arrays --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    path: Path
    specs: tuple[TensorSpec, ...]
    samples: int
    labelled: bool

    def batches(self, size: int) -> Iterator[tuple[Tensors, Labels]]:
        return self._batches(size, self.samples)

    def _batches(self, size: int, left: int) -> Iterator[tuple[Tensors, Labels]]:
        with ExitStack() as stack, _reading():
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            names = [spec.name for spec in self.specs] + ([LABELS] if self.labelled else [])
            members = {name: _open(archive, name, stack) for name in names}
            while left > 0:
                count = min(size, left)
                parts = {name: _rows(name, member, count) for name, member in members.items()}
                labels = parts.pop(LABELS).astype(np.int64) if self.labelled else np.zeros(0, np.int64)
                yield parts, labels
                left -= count

    def pick(self, count: int) -> Picked:
        there = min(self.samples, _PICKED_FROM)
        wanted = _spaced(there, count)
        found: dict[str, list[Array]] = {spec.name: [] for spec in self.specs}
        place = 0
        for inputs, _ in self._batches(_PICK_BATCH, there):
            size = len(next(iter(inputs.values())))
            rows = wanted[(wanted >= place) & (wanted < place + size)] - place
            for name, array in inputs.items():
                found[name].append(array[rows])
            place += size
        return Picked({name: np.concatenate(parts) for name, parts in found.items()})


@dataclass(frozen=True)
class _Member:
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _open_arrays(path: Path, specs: Sequence[TensorSpec], classes: int | None) -> _Arrays:
    """Looks at the arrays' headers, and at the labels."""
    wanted = [spec.name for spec in specs] + ([LABELS] if classes is not None else [])
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        there = sorted(name.removesuffix(".npy") for name in archive.namelist())
        if missing := [name for name in wanted if name not in there]:
            raise _unreadable(f"it has no array {' and no '.join(missing)}; it has {', '.join(there[:8])[:300]}")
        members = {name: _open(archive, name, stack) for name in wanted}
        counts = {name: member.shape[0] if member.shape else 0 for name, member in members.items()}
        samples = counts[wanted[0]]
        if len(set(counts.values())) > 1 or not 1 <= samples <= _MOST_SAMPLES:
            raise _unreadable(f"its arrays have {', '.join(f'{count} {name}' for name, count in counts.items())}")
        for spec in specs:
            member = members[spec.name]
            if NAMES.get(member.dtype) is not spec.data_type or not fits(member.shape, (samples, *spec.shape)):
                raise _unreadable(
                    f"{spec.name} is {member.dtype} of shape {list(member.shape)}, the version's input is {spec.data_type} of "
                    f"{list(spec.shape)} behind the samples"
                )
        if classes is not None:
            _check_labels(members[LABELS], samples, classes)
    return _Arrays(path, tuple(specs), samples, classes is not None)


def _check_labels(member: _Member, samples: int, classes: int) -> None:
    if member.dtype.kind not in "iu" or len(member.shape) != 1:
        raise _unreadable(
            f"labels is {member.dtype} of shape {list(member.shape)}; whole numbers are needed, one for each sample"
        )
    labels = _rows(LABELS, member, samples)
    if labels.min() < 0 or labels.max() >= classes:
        raise _unreadable(
            f"its labels go from {labels.min()} to {labels.max()}, and the first output has the classes 0 to {classes - 1}"
        )


def _open(archive: zipfile.ZipFile, name: str, stack: ExitStack) -> _Member:
    stream = stack.enter_context(archive.open(f"{name}.npy"))
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise _unreadable(f"{name} is in version {version} of numpy's format; save it with numpy.savez")
    shape, fortran, dtype = read(stream, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject:
        raise _unreadable(f"{name} holds Python objects, which are not unpickled; save plain numbers")
    there = archive.getinfo(f"{name}.npy").file_size - stream.tell()
    if dtype.itemsize * math.prod(shape) != there or min(shape, default=0) < 0:
        raise _unreadable(f"{name} says that it has shape {list(shape)} of {dtype}, and holds {there:,} bytes")
    if fortran and len(shape) > 1:
        raise _unreadable(f"{name} is in Fortran order; save numpy.ascontiguousarray of it")
    return _Member(stream, shape, dtype)


def _rows(name: str, member: _Member, count: int) -> Array:
    wanted = count * int(np.prod(member.shape[1:], dtype=np.int64)) * member.dtype.itemsize
    content = member.stream.read(wanted)
    if len(content) != wanted:
        raise _unreadable(f"{name} ends before its last sample")
    rows = np.frombuffer(content, member.dtype).reshape(count, *member.shape[1:]).copy()  # torch warns of what is read-only
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise _unreadable(f"{name} holds NaN or Inf")
    return rows


# --- pictures ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    place: Any
    """As the archive's library tells where it lies: asked by name, a tar is searched from its first entry on."""


@dataclass(frozen=True)
class _Pictures:
    path: Path
    asked: Preprocessing
    spec: TensorSpec
    entries: tuple[_Entry, ...]
    """In the order in which they lie in the archive: a compressed tar begins anew for whoever goes back in it."""
    labels: tuple[int, ...]
    """As many as entries, or none."""

    @property
    def samples(self) -> int:
        return len(self.entries)

    def batches(self, size: int) -> Iterator[tuple[Tensors, Labels]]:
        with _reading(), _opened(self.path) as archive:
            for start in range(0, self.samples, size):
                entries = self.entries[start : start + size]
                yield self._prepare(entries, [archive.read(entry) for entry in entries]), self._labels(start, start + size)

    def pick(self, count: int) -> Picked:
        entries = [self.entries[place] for place in _spaced(self.samples, count)]
        with _reading(), _opened(self.path) as archive:
            pictures = [archive.read(entry) for entry in entries]
        return Picked(self._prepare(entries, pictures), tuple(pictures))

    def _labels(self, start: int, end: int) -> Labels:
        return np.array(self.labels[start:end], np.int64)

    def _prepare(self, entries: Sequence[_Entry], pictures: Sequence[bytes]) -> Tensors:
        try:
            return prepare_pictures(pictures, self.asked, self.spec)
        except ValueError:
            for entry, picture in zip(entries, pictures, strict=True):
                try:
                    prepare_pictures([picture], self.asked, self.spec)
                except ValueError as error:
                    raise _unreadable(f"{entry.name[-100:]}: {error}") from error
            raise


class _Archive(Protocol):
    def pictures(self) -> list[_Entry]:
        """Its regular files, but for hidden ones, as they lie there."""

    def read(self, entry: _Entry) -> bytes: ...


class _Zip:
    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file

    def pictures(self) -> list[_Entry]:
        there = sorted(self._file.infolist(), key=lambda entry: entry.header_offset)
        return _wanted(_Entry(entry.filename, entry.file_size, entry) for entry in there if not entry.is_dir())

    def read(self, entry: _Entry) -> bytes:
        return self._file.read(entry.place)


class _Tar:
    def __init__(self, file: tarfile.TarFile) -> None:
        self._file = file

    def pictures(self) -> list[_Entry]:
        """What is no regular file (links, devices) is passed over with the folders, and never followed."""
        return _wanted(_Entry(entry.name, entry.size, entry) for entry in self._file if entry.isreg())

    def read(self, entry: _Entry) -> bytes:
        stream = self._file.extractfile(entry.place)
        return stream.read() if stream else b""


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            yield _Zip(file)
    else:
        with tarfile.open(path) as tar:
            yield _Tar(tar)


def _wanted(entries: Iterable[_Entry]) -> list[_Entry]:
    found = []
    for entry in entries:
        parts = PurePosixPath(entry.name).parts
        if any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts):
            continue
        if not entry.name.lower().endswith(_PICTURES):
            raise _unreadable(f"{entry.name[-100:]} is neither JPEG nor PNG by its name")
        if entry.size > _PICTURE_BYTES:
            raise _unreadable(f"{entry.name[-100:]} has {entry.size:,} bytes, more than {_PICTURE_BYTES:,}")
        found.append(entry)
        if len(found) > _MOST_PICTURES:
            raise _unreadable(f"it has more than {_MOST_PICTURES:,} pictures")
    return found


def _open_pictures(path: Path, request: ExportRequest, classes: int | None) -> _Pictures:
    if request.preprocessing is None:  # who calls has asked
        raise ValueError("pictures without preprocessing")
    with _opened(path) as archive:
        entries = archive.pictures()
    names = [entry.name for entry in entries]
    if not names:
        raise _unreadable("there are no pictures in it")
    if len(set(names)) != len(names):
        raise _unreadable("it has a name twice")
    labels = () if classes is None else _labels_of(names, request.triton.labels, classes)
    return _Pictures(path, request.preprocessing, request.inputs[0], tuple(entries), labels)


_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "holdout")
"""Usual names of the parts of a data set. One of them alone may be a class: there are pictures of trains."""
_TRAINING = _SPLITS[:2]


def _labels_of(names: Sequence[str], known: Sequence[str] | None, classes: int) -> tuple[int, ...]:
    """A picture's class by the folder that it lies in, as torchvision's ImageFolder has it: the first one below the root.

    The root is what all pictures have in common. A folder is a name of `known` (triton.labels), or the class's number, or else
    it counts by its place among the sorted names. Where number and place are two different things nothing is guessed.
    """
    folders = _class_folders(names, set(known or ()))
    different = sorted(set(folders))
    shown = ", ".join(folder[:40] or "none" for folder in different[:5])
    by_place = {folder: place for place, folder in enumerate(different)}
    if known and set(different) <= set(known):
        numbers = {folder: list(known).index(folder) for folder in different}
    elif all(folder.isascii() and folder.isdigit() for folder in different):
        numbers = {folder: int(folder) for folder in different}
        digits = len(str(classes - 1))
        if (len(different) == classes and numbers != by_place) or any(len(folder) < digits for folder in different):
            raise _unreadable(
                f"its folders are numbers ({shown}) and may mean two things: the classes 0 to {classes - 1}, or, as "
                "torchvision's ImageFolder has it, places in the order of their text, which has 10 before 2: list the "
                f"folders' names in triton.labels, in the order of the {classes} outputs, or name each by its class's "
                f"number, from 0 on, in {digits} digits or more"
            )
    elif len(different) == classes:
        numbers = by_place
    else:
        raise _unreadable(
            f"its pictures lie in {len(different)} folders ({shown}), and there are {classes} classes: name the folders by "
            "triton.labels or by the classes' numbers, or have one for each class"
        )
    if beyond := [folder for folder, number in numbers.items() if number >= classes]:
        raise _unreadable(f"folder {beyond[0][:40]} is beyond the classes 0 to {classes - 1}")
    return tuple(numbers[folder] for folder in folders)


def _class_folders(names: Sequence[str], known: set[str]) -> list[str]:
    """The first folder below the root, for each picture. A folder that is one of the known labels is no root."""
    parts = [[part for part in PurePosixPath(name).parts[:-1] if part not in ("/", ".")] for name in names]
    roots: list[str] = []
    while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1 and parts[0][0] not in known:
        roots.append(parts[0][0])
        parts = [part[1:] for part in parts]
    _refuse_training(roots, parts, known)
    return [part[0] if part else "" for part in parts]


def _refuse_training(roots: Sequence[str], parts: Sequence[Sequence[str]], known: set[str]) -> None:
    """An archive with `train` and `val` in it, above the classes or below them, has pictures that the network was trained on."""
    below = {folder for part in parts for folder in part if folder.lower() in _SPLITS and folder not in known}
    found = sorted(below) if len(below) > 1 else [root for root in roots if root.lower() in _TRAINING]
    if found:
        raise _unreadable(
            f"its pictures lie below {' and '.join(found[:4])}, which are parts of a data set, not classes, and pictures that "
            "the network was trained on say nothing of it: pack the folder of one part alone, which it was not trained on; "
            "where these are classes, list all of them in triton.labels"
        )


# --- both ----------------------------------------------------------------------------------------------------------------


def _spaced(there: int, count: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, there - 1, min(count, there)).astype(np.int64))


_BROKEN = (
    *(OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, tarfile.TarError),
)


@contextmanager
def _reading() -> Iterator[None]:
    """Turns whatever a broken file leads its readers to into one sentence."""
    try:
        yield
    except MemoryError as error:
        raise _unreadable("reading it takes more memory than there is") from error
    except _BROKEN as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error


def _unreadable(why: str) -> StepFailed:
    return StepFailed(Reason.DATASET_UNREADABLE, f"the data set cannot be used: {why}")
