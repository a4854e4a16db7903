"""The cases of a grid that are tested: enough for every two values to meet, or all with FEDLORA_TESTS=all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

WHOLE = os.environ.get("FEDLORA_TESTS") == "all"
"""Whether all cases are tested, as `make test-all` asks."""


def few(*cases: Any) -> Sequence[Any]:
    """Return the first case alone, or all with FEDLORA_TESTS=all: for cases that take long and differ little."""
    return cases if WHOLE else cases[:1]


def covering(*axes: Sequence[Any], valid: Callable[..., bool] = lambda *case: True, whole: bool = WHOLE) -> list[tuple]:
    """Return cases in which every two values of different axes meet at least once, if any valid case has both.

    They are chosen one by one: each is the case with the most pairs that are still missing. The same axes always give
    the same cases.

    Args:
        axes: the values of each axis. A value that is a tuple is spread out in the case.
        valid: returns whether a case is possible, given one value of each axis.
        whole: return every valid case.
    """
    grid = [case for case in itertools.product(*axes) if valid(*case)]
    chosen = grid if whole else []
    missing = set() if whole else {pair for case in grid for pair in _pairs(case)}
    while missing:
        best = max(grid, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(itertools.chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in case))
            for case in chosen]


def _pairs(case: tuple) -> set[tuple]:
    places = list(enumerate(case))
    return set(itertools.combinations(places, 2)) if len(places) > 1 else {tuple(places)}
