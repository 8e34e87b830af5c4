"""Golden samples: the inputs on which checkpoint and artefact are compared, and the checkpoint's answers to them.

convert makes them, publish checks them, and the golden sidecar replays them beside every Triton. numpy only, and never
a pickle: golden.npz may come from a container that ran somebody's bytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perch_exporter.contract import DataType, Reason, TensorSpec
from perch_exporter.failure import StepFailed

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

DTYPES: Mapping[DataType, np.dtype[Any]] = {
    DataType.FP32: np.dtype(np.float32),
    DataType.FP16: np.dtype(np.float16),
    DataType.INT64: np.dtype(np.int64),
    DataType.INT32: np.dtype(np.int32),
    DataType.UINT8: np.dtype(np.uint8),
    DataType.BOOL: np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

GOLDEN_LIMIT = 32 * 2**20
"""Most bytes of golden.npz: each Triton pod brings it along."""

_INPUT_BUDGET = 8 * 2**20
_MOST, _FEWEST = 16, 4
_WORK_BUDGET, _FEWEST_WORKED = 64 * 10**9, 6
"""Of multiplications and additions. Six samples still make batches of three sizes."""
_DYNAMIC = 224
_INTEGERS = 10
"""Integer inputs are 0 to 9: most often they count or index something, and what they index may be short."""


@dataclass(frozen=True)
class Golden:
    """Inputs and the checkpoint's outputs by name, [samples, *shape] each."""

    inputs: Tensors
    outputs: Tensors

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def repeated(self, samples: int) -> Golden:
        """So many samples, over and over again."""
        rows = np.arange(samples) % self.samples
        inputs, outputs = ({name: array[rows] for name, array in arrays.items()} for arrays in (self.inputs, self.outputs))
        return Golden(inputs, outputs)


def sample_count(specs: Sequence[TensorSpec], operations: int = 0, dynamic: int = _DYNAMIC) -> int:
    """As many as fit the budgets, 4 to 16: 13 pictures of 3x224x224, and 6 where the network takes much work for one.

    `operations`: multiplications and additions for one sample, as far as they are known. `dynamic`: the size of
    a dimension of -1.
    """
    each = sum(DTYPES[spec.data_type].itemsize * int(np.prod(concrete(spec.shape, dynamic), dtype=np.int64)) for spec in specs)
    if _FEWEST * each > GOLDEN_LIMIT // 2:
        raise StepFailed(
            Reason.SHAPE_MISMATCH,
            f"one sample of the inputs takes {each:,} bytes; {_FEWEST} of them do not fit the golden samples' "
            f"{GOLDEN_LIMIT // 2:,} bytes",
        )
    by_work = max(_FEWEST_WORKED, _WORK_BUDGET // max(1, operations))
    return max(_FEWEST, min(_MOST, _INPUT_BUDGET // each, by_work))


def concrete(shape: Sequence[int], dynamic: int = _DYNAMIC) -> tuple[int, ...]:
    return tuple(dynamic if dimension == -1 else dimension for dimension in shape)


def surest(scores: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Numbers of `count` samples in ascending order, for each class in turn those that lead by most.

    scores: [samples, classes]. A sample that two classes nearly share says little of an artefact: another device's rounding
    decides it.
    """
    ordered = np.sort(scores.astype(np.float64), axis=1)
    lead = ordered[:, -1] - ordered[:, -2]
    rank = np.empty(len(scores), np.intp)
    best = scores.argmax(axis=1)
    for kind in np.unique(best):
        own = np.flatnonzero(best == kind)
        rank[own[np.argsort(-lead[own], kind="stable")]] = np.arange(len(own))
    return np.sort(np.lexsort((-lead, rank))[:count])


def in_batches(answer: Callable[[Tensors], Tensors], inputs: Tensors, batch: int) -> dict[str, Array]:
    """The answers to any number of samples, asked so many at a time."""
    count = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, count, batch):
        asked = {name: array[start : start + batch] for name, array in inputs.items()}
        part = answer(asked)
        _check_rows(part, min(batch, count - start))
        parts.append(part)
    return joined(parts)


def _check_rows(answers: Tensors, samples: int) -> None:
    for name, array in answers.items():
        rows = len(array) if array.ndim else 0
        if rows != samples:
            said = f"{rows} rows" if array.ndim else "a single number"
            raise StepFailed(
                Reason.SHAPE_MISMATCH,
                f"{name} has {said} for {samples} samples: it must have one row for each, whatever else is in the batch",
            )


def joined(parts: Sequence[Tensors]) -> dict[str, Array]:
    """The answers to several batches as to one. Raises ExportFailed where they do not fit each other."""
    found = {}
    for name in parts[0]:
        try:
            found[name] = np.concatenate([part[name] for part in parts])
        except ValueError as error:
            shapes = ", ".join(dict.fromkeys(str(list(part[name].shape)) for part in parts))
            raise StepFailed(
                Reason.EXPORT_FAILED,
                f"{name} has the shapes {shapes} in batches one after the other: it must have a row for each sample, and only "
                "their number may follow the batch",
            ) from error
    return found


def fits(shape: Sequence[int], stated: Sequence[int]) -> bool:
    return len(shape) == len(stated) and all(said in (-1, size) for size, said in zip(shape, stated, strict=True))


def make_inputs(specs: Sequence[TensorSpec], seed: str, count: int, dynamic: int = _DYNAMIC) -> dict[str, Array]:
    """[count, *shape] each, the same for the same seed.

    Plain noise makes a convolutional network answer nearly the same to every sample, since it averages out; so the
    samples differ in what survives averaging: level, contrast and patches of several sizes.
    """
    return {
        spec.name: np.stack([_sample(spec, [int(seed, 16), place, index], dynamic) for index in range(count)])
        for place, spec in enumerate(specs)
    }


def _sample(spec: TensorSpec, seed: list[int], dynamic: int) -> Array:
    random, shape, index = np.random.default_rng(seed), concrete(spec.shape, dynamic), seed[-1]
    patch = 2 ** (index % 5)
    coarse = tuple(-(-size // patch) if axis >= len(shape) - 2 else size for axis, size in enumerate(shape))
    field = random.standard_normal(coarse)
    for axis in range(max(0, len(shape) - 2), len(shape)):
        field = np.repeat(field, patch, axis=axis)
    field = field[tuple(slice(size) for size in shape)]
    level, contrast = random.uniform(-1, 1), random.uniform(0.25, 1.5)
    return _typed(level + contrast * field, spec.data_type)


def _typed(sample: Array, data_type: DataType) -> Array:
    if data_type is DataType.BOOL:
        sample = sample > 0
    elif data_type is DataType.UINT8:
        sample = np.clip(128 + 64 * sample, 0, 255)
    elif data_type in (DataType.INT32, DataType.INT64):
        sample = np.clip((sample + 2) * (_INTEGERS / 4), 0, _INTEGERS - 1)
    return sample.astype(DTYPES[data_type])


def data_type_of(array: Array) -> DataType | None:
    """None for a type that Triton, or this release, does not serve."""
    return NAMES.get(array.dtype)


def save_golden(golden: Golden, path: Path, what: str = "the golden samples") -> None:
    """Stored and not compressed: equal samples give equal bytes, and no reader needs to fear what unpacks."""
    arrays = {f"inputs/{name}": array for name, array in golden.inputs.items()}
    arrays |= {f"outputs/{name}": array for name, array in golden.outputs.items()}
    np.savez(path, allow_pickle=False, **arrays)
    if path.stat().st_size > GOLDEN_LIMIT:
        raise StepFailed(
            Reason.SHAPE_MISMATCH,
            f"{what} take {path.stat().st_size:,} bytes, more than {GOLDEN_LIMIT:,}: the outputs are too large",
        )


def load_golden(path: Path) -> Golden:
    """Raises OutputRejected where the file is anything else than `load_answers` says, with one row for each sample everywhere."""
    groups = _load(path)
    for group, arrays in groups.items():
        if not arrays:
            raise _rejected(f"there are no {group}")
    counts = {f"{group}/{name}": len(array) for group, arrays in groups.items() for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        rows = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise _rejected(f"its arrays are of unequally many samples: {rows}")
    return Golden(**groups)


def load_answers(path: Path) -> Tensors:
    """Answers whose samples lie elsewhere. Raises OutputRejected where the file is not plainly stored arrays of numbers."""
    return _load(path)["outputs"]


def _load(path: Path) -> dict[str, dict[str, Array]]:
    groups: dict[str, dict[str, Array]] = {"inputs": {}, "outputs": {}}
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise _rejected(f"{packed[0]} is compressed")
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                group, _, name = key.partition("/")
                array = file[key]
                # A member that does not begin as an array comes back as bytes.
                if not isinstance(array, np.ndarray) or data_type_of(array) is None or array.ndim < 1:
                    raise _rejected(f"{key!r} is not an array of a known data type with a dimension for samples")
                if group not in groups or not name:
                    raise _rejected(f"{key!r} is neither of inputs/ nor of outputs/")
                groups[group][name] = array
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _rejected(f"{type(error).__name__}: {error}") from error
    return groups


def _rejected(why: str) -> StepFailed:
    return StepFailed(Reason.OUTPUT_REJECTED, f"golden.npz cannot be used: {why}")
