"""A client's part in one secure sum, as far as the training needs to know it.

Training adds the client's share of the noise and turns its clipped sum into integers. What happens to the integers then
is the part's matter: a deployed client masks them, a simulated one gives them away as they are, to the same bits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fedlora.secure_sum.integers import Grid


class SumPart(Protocol):
    """One client's part in the sum of one attempt at a round.

    Attributes:
        grid: the integers of the run.
        values: the most values in a vector; those of a round that trains all tensors.
        noise: least standard deviation, in units of the grid, of the noise that this client must add.
    """

    grid: Grid
    values: int
    noise: float

    def accept(self, sent: bytes) -> None:
        """Check the cohort, before anything is charged.

        Args:
            sent: digest of the tensors that the round starts from.

        Raises:
            fedlora.secure_sum.statements.Refused: this client does not take part in such a sum.
        """

    def masked(self, integers: np.ndarray) -> np.ndarray:
        """Return what is uploaded, (values,) unsigned integers of the ring.

        Args:
            integers: (values,) the encoded sum with this client's noise, int64, in units of the grid.
        """


class PlainPart:
    """The part of a simulated client: nothing is masked.

    Args:
        grid: the integers of the run.
        values: the most values in a vector.
        noise: least standard deviation of the client's noise, in units of the grid.
    """

    def __init__(self, grid: Grid, values: int, noise: float) -> None:
        self.grid, self.values, self.noise = grid, values, noise

    def accept(self, sent: bytes) -> None:
        """Accept: one process simulates all members."""

    def masked(self, integers: np.ndarray) -> np.ndarray:
        """Return the integers modulo the ring."""
        return self.grid.wrapped(integers)
