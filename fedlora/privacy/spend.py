"""RDP accounting: an upper bound on the privacy cost of noised steps, from their Rényi divergences.

The bound takes milliseconds to compute. PRV's bound replaces it only where that is smaller.

Unit and relation are those of `fedlora.privacy.accounting`: one unit, zero-out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedlora.privacy import renyi

RDP_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 80, 96, 128, 192, 256, 384, 512)
"""Rényi orders among which a run's epsilon is minimised."""


@dataclass(frozen=True)
class Spend:
    """A number of steps with one noise multiplier and one sampling rate.

    Attributes:
        noise_multiplier: standard deviation of the noise / clip norm; positive and finite.
        sampling_rate: probability with which each unit enters a step, in (0, 1].
        steps: at least 1.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier is {self.noise_multiplier!r}; it must be positive and finite, since "
                             "without noise there is no guarantee to account for")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate!r}; it must be in (0, 1]")
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"steps is {self.steps!r}; it must be a positive integer")


def rdp(spend: Spend, orders: tuple[float, ...] = RDP_ORDERS) -> np.ndarray:
    """Return the Rényi divergence of `spend` at each order, `[len(orders)]`; infinite where it cannot be computed."""
    return spend.steps * renyi.divergence(spend.noise_multiplier, spend.sampling_rate, orders)


def rdp_epsilon(history: tuple[Spend, ...], delta: float, orders: tuple[float, ...] = RDP_ORDERS) -> float:
    """Return RDP's upper bound on epsilon at `delta`, at the best of the orders.

    Sources: arXiv:1908.10530 for the divergence, arXiv:1905.09982 (theorem 21) for its conversion.

    Args:
        history: the steps, in any order.
        delta: in (0, 1).
        orders: the Rényi orders to choose from. They must not depend on the data.

    Returns:
        0.0 for an empty history; infinity if no order gives a finite bound.

    Raises:
        ValueError: delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta!r}; it must be in (0, 1)")
    if not history:
        return 0.0
    return renyi.epsilon(orders, np.sum([rdp(spend, orders) for spend in history], axis=0), delta)
