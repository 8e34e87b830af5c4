"""The network's scores to the best classes and their names.

Used twice, as `pictures` is: its text is published as the code of Triton's postprocessing model, and the golden check asks it
what that model has to answer. numpy alone, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Ranking:
    softmax: bool
    top: int
    labels: Sequence[str]
    """A name for each class; none at all: classes are called by their number."""

    def name(self, index: int) -> str:
        return self.labels[index] if self.labels else str(index)


def scores(outputs: npt.NDArray[np.float32], ranking: Ranking) -> npt.NDArray[np.float32]:
    """[N, classes]: the outputs as they are, or as shares of one."""
    if not ranking.softmax:
        return outputs
    powers = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def rank(outputs: npt.NDArray[np.float32], ranking: Ranking) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.float32]]:
    """Names (UTF-8) and scores of the best classes, [N, top] each, the best first; of equals the first class."""
    values = scores(outputs, ranking)
    best = np.argsort(-values, axis=1, kind="stable")[:, : ranking.top]
    names = np.array([[ranking.name(index).encode() for index in row] for row in best.tolist()], np.object_)
    return names.reshape(best.shape), np.take_along_axis(values, best, axis=1)
