"""When are two lists of detections the same? Pure numpy; `perch_exporter.parity` judges by it, in prove, publish and golden.

Element by element they never are: where two scores lie closer than rounding their rows change places, and the last of D rows is
decided by as little. So each detection is to have a partner in the other's list, for the same picture: the same label and
an overlap (intersection over union) of at least `minimum_iou`, or no corner further off than half a pixel. Nobody has two.

Not asked of are rows that barely made it into their list, with a score within the tolerance of where the other's ends: the other
may have cut them off. A list ends at its lowest score where all D rows are used; else at the lowest of any picture, which stands
for the network's own threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BOXES, LABELS, SCORES = "boxes", "labels", "scores"
"""Outputs: float32 [N, D, 4] as x1, y1, x2, y2, int64 [N, D], float32 [N, D]. Rows of score 0 hold nothing."""

_CORNER = 0.5
"""In pixels: boxes of a few pixels overlap little where they are a rounding apart."""

Lists = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Agreement:
    """`asked`: detections of both sides that should have a partner; `alone`: those that have none.

    `score_error`: the largest difference between the scores of partners.
    """

    asked: int
    alone: int
    score_error: float

    @property
    def share_alone(self) -> float:
        return self.alone / self.asked if self.asked else 0.0


def compare(reference: Lists, actual: Lists, score_tolerance: float, minimum_iou: float) -> Agreement:
    """Of equal shapes, with finite numbers."""
    scores = np.concatenate([reference[SCORES], actual[SCORES]])
    threshold = float(scores[scores > 0].min(initial=np.inf))
    asked = alone = 0
    error = 0.0
    for ours, theirs in zip(_pictures(reference), _pictures(actual), strict=True):
        partner = _partners(ours, theirs, minimum_iou)
        found = partner >= 0
        taken = np.zeros(len(theirs[SCORES]), bool)
        taken[partner[found]] = True
        differences = np.abs(ours[SCORES][found].astype(np.float64) - theirs[SCORES][partner[found]])
        error = max(error, float(differences.max(initial=0.0)))
        for own, other, paired in ((ours, theirs, found), (theirs, ours, taken)):
            clear = own[SCORES] > _end(other[SCORES], threshold) + score_tolerance
            asked += int(clear.sum())
            alone += int((clear & ~paired).sum())
    return Agreement(asked, alone, error)


def aligned(reference: Lists, actual: Lists, minimum_iou: float) -> dict[str, npt.NDArray[Any]]:
    """`actual` with each row in its partner's place, and the others where there is room: to be looked at."""
    orders = []
    for ours, theirs in zip(_pictures(reference), _pictures(actual), strict=True):
        order = _partners(ours, theirs, minimum_iou)
        order[order < 0] = np.setdiff1d(np.arange(len(order)), order)
        orders.append(order)
    return {name: np.stack([array[order] for array, order in zip(actual[name], orders, strict=True)]) for name in actual}


def _pictures(lists: Lists) -> list[Lists]:
    return [{name: array[place] for name, array in lists.items()} for place in range(len(lists[SCORES]))]


def _end(scores: npt.NDArray[np.floating], threshold: float) -> float:
    """The score below which this list keeps nothing."""
    return float(scores.min(initial=np.inf)) if (scores > 0).all() else threshold


def _partners(ours: Lists, theirs: Lists, minimum_iou: float) -> npt.NDArray[np.intp]:
    """For each of our rows the place of its partner in theirs, or -1. The surest choose first."""
    likeness = _likeness(ours[BOXES].astype(np.float64), theirs[BOXES].astype(np.float64), minimum_iou)
    likeness[ours[LABELS][:, None] != theirs[LABELS][None]] = -1
    likeness[(ours[SCORES] <= 0)[:, None] | (theirs[SCORES] <= 0)[None]] = -1
    partner = np.full(len(likeness), -1, np.intp)
    for row in np.argsort(-ours[SCORES], kind="stable"):
        best = int(likeness[row].argmax())
        if likeness[row, best] >= 0:
            partner[row] = best
            likeness[:, best] = -1
    return partner


def _likeness(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], minimum_iou: float) -> npt.NDArray[np.float64]:
    """[rows, rows]: the overlap where two boxes may be partners, else -1."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (ours, theirs)]
    either = areas[0][:, None] + areas[1][None] - common
    overlap = np.divide(common, either, out=np.zeros_like(common), where=either > 0)
    near = np.abs(ours[:, None] - theirs[None]).max(axis=2) <= _CORNER
    return np.where((overlap >= minimum_iou) | near, overlap, -1)
