"""The best success of an attacker who wants to know about one unit: what an (epsilon, delta) amounts to in practice.

An attacker sees everything that a run released, and decides between two cases: one unit's records were used, or they
contributed nothing. The trade-off function (Dong, Roth, Su 2019, arXiv:1905.02383) gives the smallest rate of misses
for each rate of false alarms, over all attackers. It follows from delta as a function of epsilon, for all epsilon >= 0:
whoever raises a false alarm with probability a finds the unit with probability at most

    delta(epsilon) + e^epsilon a      and at most      1 - e^-epsilon (1 - delta(epsilon) - a)

(arXiv:1905.02383, proposition 2.12). The tightest of these bounds is far below the one that a single (epsilon, delta)
gives. delta(epsilon) is that of `accounting.privacy_loss`, an upper bound, so every figure here is an upper bound too.

Unit and relation are those of `fedlora.privacy.accounting`: one unit, zero-out. Nothing is said about groups of units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlora.privacy.accounting import PRV_LIMIT, privacy_loss
from fedlora.privacy.spend import Spend, rdp_epsilon

FALSE_ALARMS = (0.01, 0.001)
"""Rates of false alarms at which an attacker's success is stated."""

_DELTA = 1e-5
"""Delta at which it is decided whether a history is too large for the distribution of its privacy loss."""

_GRID = np.concatenate([np.arange(0.0, 8.0, 0.025), np.arange(8.0, PRV_LIMIT, 0.5)])
"""Epsilons at which delta is taken. Each gives a bound that holds, so a coarse grid costs tightness (here
below 0.1 %) and no truth."""


@dataclass(frozen=True)
class Attack:
    """The most that an attacker can achieve against one unit.

    Attributes:
        even_odds: probability of a right answer if both cases are equally likely; 0.5 is mere guessing.
        found: for each of `FALSE_ALARMS`, the probability that a unit whose records were used is found.
    """

    even_odds: float
    found: tuple[float, ...]


@functools.lru_cache(maxsize=256)
def attack(history: tuple[Spend, ...]) -> Attack | None:
    """Return the most that an attacker can achieve who sees everything that a history of steps released.

    Args:
        history: the steps. Their parameters must not depend on what was released.

    Returns:
        None for a history whose epsilon is so large (`accounting.PRV_LIMIT`) that there is nothing to bound.
    """
    if not history:
        return Attack(0.5, FALSE_ALARMS)
    if rdp_epsilon(history, _DELTA) > PRV_LIMIT:
        return None
    loss = privacy_loss(history)

    @functools.cache  # each look-up passes over the whole distribution
    def delta(place: int) -> float:
        return float(loss.get_delta_for_epsilon(float(_GRID[place])))

    def found(rate: float) -> float:
        return min(_least(lambda place: delta(place) + math.exp(_GRID[place]) * rate),
                   _least(lambda place: 1 - math.exp(-_GRID[place]) * (1 - delta(place) - rate)))

    return Attack(min(1.0, (1 + delta(0)) / 2), tuple(min(1.0, found(rate)) for rate in FALSE_ALARMS))


def _least(bound: Callable[[int], float]) -> float:
    """Return the smallest of a bound's values at the places of `_GRID`.

    The values first fall and then rise, for both bounds: delta is convex as a function of e^epsilon, and
    e^-epsilon delta as a function of e^-epsilon.
    """
    low, high = 0, len(_GRID) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= bound(middle + 1) else (middle + 1, high)
    return bound(low)


def suspicion(prior: float, found: float, false_alarms: float) -> float:
    """Return how likely it is that a unit's records were used, once an attack has said so.

    Args:
        prior: how likely it was before.
        found: probability with which the attack says so if they were used.
        false_alarms: probability with which it says so if they were not.
    """
    return prior * found / (prior * found + (1 - prior) * false_alarms)
