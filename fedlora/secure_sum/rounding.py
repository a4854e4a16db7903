"""The noise of a secure sum: Gaussian noise that each client rounds to the grid.

`fedlora.privacy.rounding` bounds what rounding changes.
"""

from __future__ import annotations

import math

import numpy as np

from fedlora.privacy.rng import DRAWS, RandomStream

MOST_DEVIATIONS = math.sqrt(DRAWS * 2 * 53 * math.log(2))
"""No value of `RandomStream.gaussian` is longer than this: each of its draws is at most √(2·53·ln 2 / DRAWS)."""


def rounded_noise(stream: RandomStream, deviation: float, count: int) -> np.ndarray:
    """Return `count` draws of N(0, deviation²), each rounded to an integer, int64."""
    return np.rint(deviation * stream.gaussian(count)).astype(np.int64)
