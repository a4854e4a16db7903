"""The integers that are added in a secure sum, and how real values become integers and back.

Values are multiples of C·2^-k, where C is the plan's clip norm. They are added modulo 2^32 or 2^64, the smaller one in
which no sum of the roster can overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedlora.privacy.mechanisms.distributed_gaussian import MOST_INFLATION, sum_sensitivity
from fedlora.secure_sum.rounding import MOST_DEVIATIONS

LEAST_FRACTION_BITS = 16
"""Fewest fraction bits of a grid. With noise of a few tenths of the clip norm, rounding in several runs then adds less
than a hundredth of 1e-5 to δ up to an ε of about 14, however few values a vector has."""


@dataclass(frozen=True)
class Grid:
    """The integers of a run.

    Attributes:
        clip_norm: C of the plan. A client may clip to less; its grid stays the same.
        fraction_bits: k. One unit of the grid is C·2^-k.
        ring_bits: 32 or 64. Sums are taken modulo two to this power.
        most: largest absolute value, in units of the grid, of a client's clipped sum in one coordinate, before noise.
            What is longer is cut there. That is a projection, so it does not raise the sensitivity.
    """

    clip_norm: float
    fraction_bits: int
    ring_bits: int
    most: int

    @classmethod
    def fitting(cls, values: int, *, clip_norm: float, expected_batch: int, members: int, noise: float) -> Grid:
        """Return the coarsest grid whose rounding costs little, in the smallest ring that holds it.

        Rounding may raise the sensitivity by `MOST_INFLATION`, and the grid has `LEAST_FRACTION_BITS`.

        Args:
            values: number d of values in a vector.
            clip_norm: C.
            expected_batch: b, the units that a step samples on average. A client's sum is cut at the length of 2b + 100
                clipped gradients.
            members: the most clients in a sum.
            noise: standard deviation of a client's noise, in units of C.

        Raises:
            ValueError: no ring holds the sum.
        """
        fraction_bits = max(LEAST_FRACTION_BITS, math.ceil(math.log2(math.sqrt(values) / MOST_INFLATION)))
        most = (2 * expected_batch + 100) << fraction_bits
        longest = min(MOST_DEVIATIONS * noise * 2.0**fraction_bits, 2.0**64)  # finite, whatever noise somebody names
        reach = members * (most + math.ceil(longest) + 1)
        for ring_bits in (32, 64):
            if reach < 1 << (ring_bits - 1):
                return cls(clip_norm, fraction_bits, ring_bits, most)
        raise ValueError(f"the sum of {members} clients' vectors of {values} values with noise of {noise:g} clip norms "
                         "can exceed 64 bits; lower the noise, the batch size or the number of trained values")

    @property
    def step(self) -> float:
        """One unit of the grid, as a real value."""
        return self.clip_norm * 2.0**-self.fraction_bits

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The dtype of masked vectors: unsigned integers of the ring, little-endian."""
        return np.dtype(f"<u{self.ring_bits // 8}")

    def sensitivity(self, values: int, clip_norm: float) -> float:
        """Return how far one unit can move an encoded sum, in units of the grid (L2).

        Args:
            values: number d of values in the vector.
            clip_norm: the client's own clip norm, at most the plan's.
        """
        return sum_sensitivity(clip_norm, self.step, values)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return real values in units of the grid, rounded to the nearest and cut at `most`, int64.

        Raises:
            ValueError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise ValueError("the sum to be encoded has values that are not finite")
        return np.rint(np.clip(values / self.step, -self.most, self.most)).astype(np.int64)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """Return the real values of a sum of the ring, float64."""
        return self.signed(total.astype(self.dtype)).astype(np.float64) * self.step

    def signed(self, total: np.ndarray) -> np.ndarray:
        """Return the numbers that unsigned integers of the ring stand for, from −2^(bits−1) on, int64."""
        return total.view(f"<i{self.ring_bits // 8}").astype(np.int64)

    def wrapped(self, integers: np.ndarray) -> np.ndarray:
        """Return integers modulo the ring."""
        return integers.astype(np.int64).view(np.uint64).astype(self.dtype)
