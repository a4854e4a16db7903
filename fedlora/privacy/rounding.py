"""What it changes that each client of a sum rounds its noise to a grid: a bound on what rounding adds to delta.

For one client it changes nothing that can be held against it: integer + round(G) = round(integer + G), a function of
the Gaussian mechanism's output. For a sum, the noise that h honest clients add, Σ round(G_i), is not the rounding of
one Gaussian, but nearly. With s the standard deviation of each G_i in units of the grid, compare it with

    round(N(0, h·s² + (h − 1)/12)),

which has the same mean and variance, and whose privacy is that of a Gaussian mechanism of at least that variance. The
two differ from the fourth cumulant on: the total variation between them falls with s⁻⁴. A guarantee (ε, δ) that holds
for the second, over all coordinates and rounds of a run, holds for the first with δ + (1 + e^ε)·τ, where τ bounds the
sum of the total variations.
"""

from __future__ import annotations

import functools
import math

import numpy as np

_EXACT = 16
"""Largest standard deviation, in units of the grid, for which the distance is computed."""

_TAIL = 10.0  # standard deviations; beyond them a Gaussian has a mass below 1e-22


def rounding_distance(deviation: float, clients: int) -> float:
    """Return a bound on the total variation between Σ round(G_i) and the rounded Gaussian that it is compared with.

    It is computed from the exact probabilities up to a standard deviation of 16 units. Beyond, the distance at 16 is
    scaled by (16 / deviation)^4: its product with deviation^4 tends to a limit, which it has reached there but for a
    hundredth. A factor of 2 is left in hand.

    Args:
        deviation: s, the standard deviation of each client's Gaussian before it is rounded, in units of the grid.
        clients: h, the number of summands.

    Raises:
        ValueError: the deviation is below 1, so that the grid is too coarse for the noise.
    """
    if deviation < 1:
        raise ValueError(f"the noise is {deviation:g} units of the grid, and must be 1 at least; choose a finer grid")
    exact = min(float(_EXACT), deviation)
    return 2 * _total_variation(exact, clients) * (exact / deviation)**4


def rounding_delta(deviation: float, clients: int, *, coordinates: int, epsilon: float) -> float:
    """Return (1 + e^ε)·τ: what rounding adds to the δ of a run.

    Args:
        deviation: s, in units of the grid.
        clients: h, the number of honest clients whose noise is in each sum.
        coordinates: number of noised values of the whole run: of a vector, times the rounds.
        epsilon: ε of the guarantee.
    """
    return (1 + math.exp(min(epsilon, 700.0))) * coordinates * rounding_distance(deviation, clients)


@functools.lru_cache(maxsize=256)
def _total_variation(deviation: float, clients: int) -> float:
    """Return the total variation between the two, from their exact probabilities."""
    single = _rounded_gaussian(deviation, math.ceil(_TAIL * deviation) + 1)
    total = np.ones(1)
    power, left = single, clients
    while left:  # the power of a distribution under convolution, by squaring
        if left & 1:
            total = np.convolve(total, power)
        left >>= 1
        if left:
            power = np.convolve(power, power)
    variance = clients * deviation**2 + (clients - 1) / 12
    compared = _rounded_gaussian(math.sqrt(variance), len(total) // 2)
    return float(np.abs(total - compared).sum() / 2)


def _rounded_gaussian(deviation: float, reach: int) -> np.ndarray:
    """Return the probabilities of round(N(0, deviation²)) at -reach … reach, float64."""
    edges = [math.erfc((k - 0.5) / (deviation * math.sqrt(2))) / 2 for k in range(reach + 2)]  # mass above k - 1/2
    upper = np.array([edges[k] - edges[k + 1] for k in range(1, reach + 1)])
    return np.concatenate([upper[::-1], [1 - 2 * edges[1]], upper])
