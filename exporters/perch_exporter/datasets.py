"""Data sets: samples, with labels or without, that somebody put into a bucket. numpy only, and never a pickle.

The form is numpy's npz (numpy.savez, compressed or not): one array for each input, [samples, *shape] in the input's data type,
and where labels are needed one named `labels`, whole numbers from 0, [samples]. It is read in batches from the archive as it lies
there: a data set may be larger than memory, and what a compressed one unpacks to never lies anywhere as a whole.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from perch_exporter.contract import Reason, TensorSpec
from perch_exporter.failure import StepFailed
from perch_exporter.samples import NAMES, Array, Tensors, fits

LABELS = "labels"
FEWEST_CALIBRATION, MOST_CALIBRATION = 16, 128
_MOST_SAMPLES = 10_000_000
_PICKED_FROM, _PICK_BATCH = 10_000, 64
_LONGEST_HEADER = 10_000

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataSet:
    """`batches` reads it from the beginning, and raises DataSetUnreadable, which names the array and what is wrong."""

    path: Path
    specs: tuple[TensorSpec, ...]
    samples: int
    labelled: bool

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensors, Labels]]:
        """Up to `limit` samples, `size` at a time: the inputs by name, and the labels, none where none were asked for."""
        left = self.samples if limit is None else min(limit, self.samples)
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

    def pick(self, count: int) -> Tensors:
        """So many samples from all over the set (its first _PICKED_FROM): in a sorted one, neighbours are of one class."""
        there = min(self.samples, _PICKED_FROM)
        wanted = np.unique(np.linspace(0, there - 1, min(count, there)).astype(np.int64))
        found: dict[str, list[Array]] = {spec.name: [] for spec in self.specs}
        place = 0
        for inputs, _ in self.batches(_PICK_BATCH, there):
            size = len(next(iter(inputs.values())))
            rows = wanted[(wanted >= place) & (wanted < place + size)] - place
            for name, array in inputs.items():
                found[name].append(array[rows])
            place += size
        return {name: np.concatenate(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class _Member:
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def open_data_set(path: Path, specs: Sequence[TensorSpec], classes: int | None = None) -> DataSet:
    """Looks at the arrays' headers alone. `classes`: labels are needed, below that number."""
    wanted = [spec.name for spec in specs] + ([LABELS] if classes is not None else [])
    with ExitStack() as stack, _reading():
        archive = stack.enter_context(zipfile.ZipFile(path))
        there = sorted(name.removesuffix(".npy") for name in archive.namelist())
        if missing := [name for name in wanted if name not in there]:
            raise _unreadable(f"it has no array {' and no '.join(missing)}; it has {', '.join(there[:8])[:300] or 'nothing'}")
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
    return DataSet(path, tuple(specs), samples, classes is not None)


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


@contextmanager
def _reading() -> Iterator[None]:
    """Turns whatever a broken file leads its readers to into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error


def _unreadable(why: str) -> StepFailed:
    return StepFailed(Reason.DATASET_UNREADABLE, f"the data set is not an npz file as it is needed: {why}")
