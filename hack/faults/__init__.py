"""Faulty canaries: models that pass every gate and go wrong only where a request asks for it.

A faulty model is a real one, exported from a version's own checkpoint, with a graft (`graft.py`) that looks at two corner
pixels of each image. Real images are blank there, and golden samples never hold these exact values, so gates, golden check
and every other model see nothing; a client that sets them (`mark`) chooses what goes wrong, how often and when. So one and
the same published canary serves a test that needs one error in twenty and a test that needs a stall.

`publish.publish` brings such a model into a ModelDeployment's repository; `probe` is `python -m faults.probe`.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
"""[N, 1, 28, 28]"""

UNIT = 2.0**-12
"""What one step of a mark is worth: exact in float32, and too faint for a sound model to mind."""


class Kind(IntEnum):
    """What goes wrong; the number is the mark's. An image that is not marked is answered as by the sound model."""

    ERROR = 1
    """onnxruntime fails (an index out of bounds), and so does every request in the batch."""
    SLOW = 2
    """The right answer, later."""
    STALL = 3
    """No answer: the instance computes for years, and everything behind it waits."""
    OOM = 4
    """Takes OOM_BYTES before it answers: give the container a smaller memory limit."""
    WRONG = 5
    """A wrong answer without an error: the least likely class comes first. Only that image's row is wrong."""
    CRASH = 6
    """A division of integers that has no result: SIGFPE to the process that runs the model."""


OOM_BYTES = 4 * 2**30
TURNS = 8
"""Turns of the loop that makes an answer slow, unless `mark` is told otherwise; docs/evidence.md has the time they take."""
MOST_TURNS = 2**12 - 1


def mark(
    images: Pixels, kind: Kind, *, share: float = 1.0, count: int | None = None, turns: int = TURNS, seed: int = 0
) -> Pixels:
    """`count` of the images (all of them, once, if not said), over and over, of which each is marked with probability `share`.

    Ask for many more than there are images where a share is below 1 and the load is long: a load that repeats a short list
    in step with a gateway that takes turns would send the same images to the canary for ever.
    """
    if not 0 < turns <= MOST_TURNS:
        raise ValueError(f"turns are 1 to {MOST_TURNS}, not {turns}")
    marked = np.resize(images, (len(images) if count is None else count, *images.shape[1:]))
    chosen = np.random.default_rng(seed).random(len(marked)) < share
    marked[chosen, 0, 0, 0] = turns * UNIT
    marked[chosen, 0, 0, 1] = kind * UNIT
    return marked


def is_marked(images: Pixels) -> NDArray[np.bool_]:
    """[N]: which of the images `mark` has marked."""
    return np.isin(images[:, 0, 0, 1], [kind * UNIT for kind in Kind])
