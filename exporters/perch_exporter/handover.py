"""What one step of the Job leaves for the next, looked at before anything of it is opened.

convert runs somebody's bytes and may have written anything: links that lead elsewhere, pipes that hang their reader, files
larger than memory. prove, build and publish take what is listed here and nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from perch_exporter.contract import Checkpoint, ExportRequest, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.picture_samples import PICTURES_LIMIT
from perch_exporter.samples import GOLDEN_LIMIT, Golden, data_type_of, fits
from perch_exporter.workspace import (
    ANSWERS,
    CALIBRATED,
    FIGURES,
    GOLDEN,
    MODEL,
    MODEL_DATA,
    OTHER,
    PICTURES,
    PLAN,
    PLAN_FIGURES,
    REFERENCE,
    REPORT,
    TIMING,
)

_OPTIONAL = {MODEL_DATA, TIMING}
TIMING_LIMIT = 8 * 2**20
"""Most bytes that fetch brings of former builds, too: its volume holds twice as many."""
REPORT_LIMIT = 8 * 2**20
_MOST_SAMPLES = 64


def handed_over(request: ExportRequest) -> dict[str, int]:
    """Files that convert leaves behind, with the most bytes of each."""
    limits = {MODEL: 2**31, MODEL_DATA: Checkpoint.LIMIT, GOLDEN: GOLDEN_LIMIT, REFERENCE: 64 * 1024}
    if has_dynamic_sizes(request):
        limits[OTHER] = GOLDEN_LIMIT
    if request.preprocessing is not None:
        limits[PICTURES] = PICTURES_LIMIT
    if request.conversion.calibration is not None:
        limits[CALIBRATED] = GOLDEN_LIMIT
    if request.verification.accuracy is not None:
        limits[ANSWERS] = 2**27
    return limits


def proven() -> dict[str, int]:
    """Files that prove leaves behind, with the most bytes of each."""
    return {FIGURES: 64 * 1024, REPORT: REPORT_LIMIT}


def built() -> dict[str, int]:
    """Files that build leaves behind, with the most bytes of each."""
    return {PLAN: Checkpoint.LIMIT, PLAN_FIGURES: 64 * 1024, TIMING: TIMING_LIMIT}


def has_dynamic_sizes(request: ExportRequest) -> bool:
    return any(-1 in spec.shape for spec in request.inputs)


def inspect(folder: Path, limits: Mapping[str, int], step: str) -> None:
    """Raises OutputRejected where the folder holds anything else than regular files of these names and sizes."""
    try:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except FileNotFoundError as error:
        raise rejected(f"{folder} is not there; did {step} run?", step) from error
    missing, strange = sorted(limits.keys() - present - _OPTIONAL), sorted(present.keys() - limits)
    if missing or strange:
        raise rejected(f"missing {missing or 'nothing'}, unexpected {[name[:64] for name in strange[:5]] or 'nothing'}", step)
    for name, status in present.items():
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise rejected(f"{name} is not a regular file of its own", step)
        if not 0 < status.st_size <= limits[name]:
            raise rejected(f"{name} has {status.st_size:,} bytes, allowed are 1 to {limits[name]:,}", step)


def inspect_golden(request: ExportRequest, golden: Golden) -> None:
    """Raises OutputRejected where the golden samples are not of the version's inputs and outputs."""
    if not 2 <= golden.samples <= _MOST_SAMPLES:
        raise rejected(f"{golden.samples} golden samples, allowed are 2 to {_MOST_SAMPLES}")
    for group, specs, tensors in (("inputs", request.inputs, golden.inputs), ("outputs", request.outputs, golden.outputs)):
        if set(tensors) != {spec.name for spec in specs}:
            raise rejected(f"golden {group} are {sorted(tensors)}, the version's {sorted(spec.name for spec in specs)}")
        for spec in specs:
            shape, data_type = tensors[spec.name].shape, data_type_of(tensors[spec.name])
            if data_type is not spec.data_type:
                raise rejected(f"golden {spec.name} is {data_type}, the version's {spec.data_type}")
            stated = (golden.samples, *spec.shape)
            if not fits(shape, stated):
                raise rejected(f"golden {spec.name} has shape {list(shape)}, the version's is {list(stated)}")


def rejected(why: str, step: str = "convert") -> StepFailed:
    return StepFailed(Reason.OUTPUT_REJECTED, f"what {step} handed over is refused: {why}")
