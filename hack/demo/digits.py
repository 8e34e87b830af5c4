"""The demo's images: scikit-learn's 1,797 handwritten digits, in the shape that LeNet-5 takes, and their split. No torch.

Training and demo both come here, so what the demo measures on was never trained on. The images are 8x8 with 17 shades of
grey, from the UCI repository's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998; CC BY 4.0).
"""

import warnings
from functools import cache

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
"""[N, 1, 28, 28], 0 (paper) to 1 (ink)."""
Labels = NDArray[np.int64]
"""[N], 0 to 9."""

HELD_OUT = 450
"""The last so many images: the file goes by writers, so most of these were written by hands that training never saw."""


def training() -> tuple[Pixels, Labels]:
    pixels, labels = _all()
    return pixels[:-HELD_OUT], labels[:-HELD_OUT]


def held_out() -> tuple[Pixels, Labels]:
    pixels, labels = _all()
    return pixels[-HELD_OUT:], labels[-HELD_OUT:]


@cache
def _all() -> tuple[Pixels, Labels]:
    with warnings.catch_warnings():
        # joblib, which nothing here uses, warns where /dev/shm cannot be written.
        warnings.simplefilter("ignore", UserWarning)
        from sklearn.datasets import load_digits
    digits = load_digits()
    return enlarge(digits.images), digits.target.astype(np.int64)


def enlarge(images: NDArray[np.float64]) -> Pixels:
    """[N, 8, 8] in 0 to 16 becomes [N, 1, 28, 28] in 0 to 1: each pixel 3x3, with a margin of 2. Exact, nothing is rounded."""
    tripled = images.repeat(3, axis=1).repeat(3, axis=2) / 16
    return np.pad(tripled, ((0, 0), (2, 2), (2, 2)))[:, None].astype(np.float32)
