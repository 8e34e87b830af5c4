"""Detections are matched: what is the same in another order passes, what is other boxes does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from perch_exporter.contract import ParityTolerance, Verdict
from perch_exporter.detections import aligned
from perch_exporter.parity import Answers, judge, within
from perch_exporter.samples import Array, Tensors

TOLERANCE = ParityTolerance(relative_tolerance="1e-2", minimum_iou="0.9")
SAMPLES, ROWS, USED = 4, 60, 50


def detections(used: int = USED, seed: int = 3) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    corner, size = random.uniform(0, 250, (SAMPLES, ROWS, 2)), random.uniform(4, 70, (SAMPLES, ROWS, 2))
    there = np.arange(ROWS) < used
    return {
        "boxes": (np.concatenate([corner, corner + size], axis=2) * there[:, None]).astype(np.float32),
        "labels": random.integers(1, 7, (SAMPLES, ROWS)) * there,
        "scores": (-np.sort(-random.uniform(0.05, 1, (SAMPLES, ROWS)), axis=1) * there).astype(np.float32),
    }


def rows(order: Array) -> Callable[[Tensors], dict[str, Array]]:
    return lambda found: {name: array[:, order] for name, array in found.items()}


def put(name: str, where: tuple[int | slice, ...], change: Callable[[Array], Array]) -> Callable[[Tensors], dict[str, Array]]:
    def changed(found: Tensors) -> dict[str, Array]:
        array = found[name].copy()
        array[where] = change(array[where])
        return {**found, name: array}

    return changed


SWAPPED = np.array([1, 0, 3, 2, *range(4, ROWS)])
EVERY = (slice(None), slice(0, USED))
CASES: list[tuple[str, Callable[[Tensors], Tensors], Verdict]] = [
    ("the same passes", lambda found: found, Verdict.PASSED),
    ("the same in another order passes", rows(SWAPPED), Verdict.PASSED),
    ("boxes that moved by rounding pass", put("boxes", EVERY, lambda b: b + np.float32(1e-3)), Verdict.PASSED),
    ("scores that moved by rounding pass", put("scores", EVERY, lambda s: s - np.float32(1e-5)), Verdict.PASSED),
    ("one of two hundred that is another passes", put("labels", (0, 0), lambda label: label % 6 + 1), Verdict.PASSED),
    ("boxes that moved by a tenth fail", put("boxes", EVERY, lambda b: b + np.float32(8)), Verdict.FAILED),
    ("other labels fail", put("labels", EVERY, lambda labels: labels % 6 + 1), Verdict.FAILED),
    ("scores that moved fail", put("scores", EVERY, lambda s: s * np.float32(0.99)), Verdict.FAILED),
    ("half of the rows fail", put("scores", (slice(None), slice(USED // 2, ROWS)), np.zeros_like), Verdict.FAILED),
    ("nothing fails", put("scores", (slice(None),), np.zeros_like), Verdict.FAILED),
    ("one box over and over fails", rows(np.zeros(ROWS, np.intp)), Verdict.FAILED),
    ("another sample's answer fails", lambda found: {k: np.roll(v, 1, axis=0) for k, v in found.items()}, Verdict.FAILED),
    ("NaN fails", put("boxes", (1, 2, 3), lambda b: b * np.nan), Verdict.FAILED),
    ("labels of another type fail", lambda found: {**found, "labels": found["labels"].astype(np.int32)}, Verdict.FAILED),
    ("fewer rows fail", rows(np.arange(ROWS - 1)), Verdict.FAILED),
    ("an output that is missing fails", lambda found: {k: v for k, v in found.items() if k != "labels"}, Verdict.FAILED),
]  # fmt: skip


@pytest.mark.parametrize("used", [USED, ROWS], ids=["with room", "full"])
@pytest.mark.parametrize(("change", "verdict"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_detections(change: Callable[[Tensors], Tensors], verdict: Verdict, used: int) -> None:
    reference = detections(used)
    found = judge([Answers(reference, change(reference), "in one batch")], TOLERANCE)
    assert found.verdict is verdict, found.message
    assert within(found, TOLERANCE) is (verdict is Verdict.PASSED)


def test_a_tie_at_the_end_of_a_full_list_may_be_decided_otherwise() -> None:
    reference = detections(ROWS)
    last = reference["scores"][:, -1:].copy()
    reference["scores"][:, -5:] = last
    other = {name: array.copy() for name, array in reference.items()}
    other["boxes"][:, -5:] = detections(ROWS, seed=8)["boxes"][:, -5:]
    assert judge([Answers(reference, other, "")], TOLERANCE).verdict is Verdict.PASSED
    # The same among the surest is no tie.
    for found in (reference, other):
        for name, array in found.items():
            found[name] = array[:, ::-1].copy()
        found["scores"][:, :5] = 0.999
    assert judge([Answers(reference, other, "")], TOLERANCE).verdict is Verdict.FAILED


def test_full_lists_of_sure_nonsense_do_not_hide_behind_the_end() -> None:
    reference = detections(ROWS)
    nonsense = detections(ROWS, seed=8) | {"scores": np.full((SAMPLES, ROWS), 1.0, np.float32)}
    assert judge([Answers(reference, nonsense, "")], TOLERANCE).verdict is Verdict.FAILED


def test_answers_that_prove_nothing_are_called_so() -> None:
    nothing = detections(0)
    found = judge([Answers(nothing, nothing, "")], TOLERANCE)
    assert (found.verdict, "finds nothing for certain" in found.message) == (Verdict.UNPROVABLE, True)
    alike = {name: np.stack([array[0]] * SAMPLES) for name, array in detections().items()}
    found = judge([Answers(alike, alike, "")], TOLERANCE)
    assert (found.verdict, "too alike" in found.message) == (Verdict.UNPROVABLE, True)


def test_small_boxes_are_the_same_within_half_a_pixel() -> None:
    reference = detections()
    reference["boxes"][..., 2:] = reference["boxes"][..., :2] + 2
    moved = {**reference, "boxes": reference["boxes"] + np.float32(0.4)}
    assert judge([Answers(reference, moved, "")], TOLERANCE).verdict is Verdict.PASSED
    moved = {**reference, "boxes": reference["boxes"] + np.float32(0.6)}
    assert judge([Answers(reference, moved, "")], TOLERANCE).verdict is Verdict.FAILED


def test_detections_are_shown_side_by_side() -> None:
    reference = detections()
    shown = aligned(reference, rows(np.random.default_rng(0).permutation(ROWS))(reference), 0.9)
    for name, array in reference.items():
        np.testing.assert_array_equal(shown[name][:, :USED], array[:, :USED])
