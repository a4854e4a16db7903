"""Which cases of a grid are tested: a set in which every two values meet, or all of them where FEDLORA_TESTS=all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

WHOLE = os.environ.get("FEDLORA_TESTS") == "all"
"""Set by `make test-all`."""


def covering(*axes: Sequence[Any], valid: Callable[..., bool] = lambda *case: True, whole: bool = WHOLE) -> list[tuple]:
    """Cases such that every two values of different axes that go together in some case are together in one.

    Built case by case: each takes the most pairs that are still missing. The same axes give the same cases.

    Args:
        axes: the values of each, which may be tuples and are then spread out in the case.
        valid: whether a case can be; asked with one value of each axis.
        whole: every valid case.
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
