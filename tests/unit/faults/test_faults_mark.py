"""Marks: which images carry one, and that nothing but a mark looks like one."""

import numpy as np
import pytest

from demo import digits
from demo.load import Tensor
from faults import MOST_TURNS, UNIT, Kind, is_marked, mark
from perch_exporter.contract import TensorSpec
from perch_exporter.samples import make_inputs


def test_no_image_of_the_demo_and_no_golden_sample_is_marked() -> None:
    spec = TensorSpec(name="image", data_type="FP32", shape=(1, 28, 28))
    golden = [make_inputs([spec], f"{seed:08x}", 16)["image"] for seed in range(50)]
    for images in (digits.training()[0], digits.held_out()[0], *golden):
        assert not is_marked(images).any()


@pytest.mark.parametrize("kind", Kind)
def test_a_share_of_one_marks_every_image_and_changes_nothing_else(kind: Kind) -> None:
    images = digits.held_out()[0]
    marked = mark(images, kind, turns=7)
    assert is_marked(marked).all()
    assert marked[0, 0, 0, :2].tolist() == [7 * UNIT, kind * UNIT]
    assert same_beyond_the_mark(marked, images)


def test_a_share_marks_that_share_of_as_many_images_as_asked_for() -> None:
    images = digits.held_out()[0]
    marked = mark(images, Kind.ERROR, share=0.2, count=5000)
    assert len(marked) == 5000
    assert is_marked(marked).mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 5000) ** 0.5)
    assert same_beyond_the_mark(marked[450:900], images)


def test_two_rounds_through_the_images_mark_different_ones() -> None:
    marked = is_marked(mark(digits.held_out()[0], Kind.ERROR, share=0.2, count=900))
    assert (marked[:450] != marked[450:]).any()


def test_the_caller_s_images_stay_as_they_were() -> None:
    images = np.zeros((3, 1, 28, 28), np.float32)
    mark(images, Kind.WRONG)
    assert not images.any()


@pytest.mark.parametrize("turns", [0, MOST_TURNS + 1])
def test_turns_that_a_mark_cannot_hold_are_refused(turns: int) -> None:
    with pytest.raises(ValueError, match="turns are"):
        mark(digits.held_out()[0], Kind.SLOW, turns=turns)


def same_beyond_the_mark(marked: Tensor, images: Tensor) -> bool:
    return bool((marked.reshape(len(marked), -1)[:, 2:] == images.reshape(len(images), -1)[:, 2:]).all())
