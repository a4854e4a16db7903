"""How the uploads of a round become one set of tensors: one file each, whose `REDUCTION` is a frozen `Reduction`.

A reduction begins a `Gathering` for each round and is given the uploads one at a time, in order of node id. One that
needs them all together gathers into `Collected`, and keeps as many uploads in memory as there are clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from fedlora.plan import Released, Tensors


class Gathering(Protocol):
    """The uploads of one round, as they come."""

    def add(self, tensors: Released, weight: float) -> None:
        """Take one upload in; `weight` is positive."""

    def result(self) -> Tensors:
        """What they give together, float32; called once, after at least one upload."""


class Reduction(Protocol):
    """A way to combine uploads; a frozen dataclass whose fields, numbers, are its options.

    Attributes:
        linear: whether it needs nothing but Σ w·u over the uploads u with weights w; only then can secure aggregation
            serve it.
    """

    linear: ClassVar[bool]

    def begin(self) -> Gathering:
        """An empty gathering, for one round."""


class Collected:
    """A gathering that keeps every upload.

    Args:
        combine: makes one set of tensors of all of them and their weights.
    """

    def __init__(self, combine: Callable[[Sequence[Tensors], Sequence[float]], Tensors]) -> None:
        self._combine = combine
        self._uploads: list[Tensors] = []
        self._weights: list[float] = []

    def add(self, tensors: Released, weight: float) -> None:
        self._uploads.append(tensors)
        self._weights.append(weight)

    def result(self) -> Tensors:
        return self._combine(self._uploads, self._weights)
