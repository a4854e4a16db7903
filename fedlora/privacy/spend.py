"""What steps cost in Rényi divergence: the accounting that is cheap, and that every other one is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedlora.privacy import renyi

RDP_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 80, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Spend:
    """`steps` steps with one noise multiplier and one sampling rate."""

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier is {self.noise_multiplier!r}; without positive, finite noise there is "
                             "no guarantee to account for")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate!r}; it must be in (0, 1]")
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"steps is {self.steps!r}; it must be a positive integer")


def rdp(spend: Spend, orders: tuple[float, ...] = RDP_ORDERS) -> np.ndarray:
    """[len(orders)] Rényi divergence of `spend` at each order; infinite at an order where it cannot be computed."""
    return spend.steps * renyi.divergence(spend.noise_multiplier, spend.sampling_rate, orders)


def rdp_epsilon(history: tuple[Spend, ...], delta: float, orders: tuple[float, ...] = RDP_ORDERS) -> float:
    """RDP's upper bound at its best order; 0.0 for an empty history, inf where no order gives a finite one."""
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta!r}; it must be in (0, 1)")
    if not history:
        return 0.0
    return renyi.epsilon(orders, np.sum([rdp(spend, orders) for spend in history], axis=0), delta)
