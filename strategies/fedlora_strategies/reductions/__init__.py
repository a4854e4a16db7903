"""Reductions, which combine the uploads of a round into one set of tensors: each file of this folder is one.

A file defines `REDUCTION`, a frozen dataclass that fits the protocol `Reduction`. A reduction begins a `Gathering` for
each round, which gets the uploads one at a time, in order of node id. A reduction that needs all uploads at once
gathers into `Collected`, which keeps all of them in memory.

A robust reduction limits what hostile clients can do to the result. It must see each upload by itself. So it cannot
work with secure aggregation, in which the server sees nothing but their sum, and says so by `linear = False`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Released, Tensors


class Gathering(Protocol):
    """The uploads of one round, added one at a time."""

    def add(self, tensors: Released, weight: float) -> None:
        """Add one upload with its weight, which is positive."""

    def result(self) -> Tensors:
        """Return the combined tensors, float32. Called once, after at least one upload was added."""


class Reduction(Protocol):
    """A way to combine uploads. It is a frozen dataclass whose fields are numbers: the user's options.

    Attributes:
        linear: Whether the reduction needs only Σ w·u over the uploads u with weights w. Only such a reduction works
            with secure aggregation.
    """

    linear: ClassVar[bool]

    @property
    def fewest(self) -> int:
        """The fewest uploads that it can combine. A round with fewer is refused and changes nothing."""
        return 1

    def withstands(self, uploads: int) -> int:
        """Return how many uploads of a round may be arbitrary, so that the others still bound the result.

        With at most so many arbitrary uploads, the distance of the result from the other uploads is bounded by how far
        these lie from each other and from what was sent, whatever the arbitrary ones are.

        Args:
            uploads: The number of uploads in the round.
        """
        return 0

    def begin(self, sent: Tensors) -> Gathering:
        """Return an empty gathering for one round.

        Args:
            sent: The tensors that clients started from: an upload minus these is the client's update. Tensors that
                are not in it count as zero. A `FactorReduction` gets the frozen tensors too,
                as clients hold them.
        """


@runtime_checkable
class FactorReduction(Reduction, Protocol):
    """A reduction that reads uploads as the factors A and B of updates, and combines the updates.

    It belongs to the recipe of its paper, in a file of this folder whose name begins with an underscore, and is no
    choice of --reduction. The result of its gathering may have new values for frozen tensors, too.

    Attributes:
        refreshes_frozen: Whether it has, so that they must be sent again.
        takes_ranks: Whether uploads may hold the first ranks of the adapter alone, each upload as many as it likes.
    """

    refreshes_frozen: ClassVar[bool]
    takes_ranks: ClassVar[bool]

    def check(self, layout: AdapterLayout) -> None:
        """Check that the reduction works with adapters of this layout.

        Raises:
            ValueError: The reduction does not work with adapters of this layout.
        """

    def averages_updates(self, layout: AdapterLayout) -> bool:
        """Return whether the reduced update ΔW is the mean of the uploads' updates, though they are not linear.

        Args:
            layout: The adapters' tensors.
        """


class Collected(Gathering):
    """A gathering that keeps every upload.

    Args:
        combine: Combines all uploads, given with their weights, into one set of tensors.
    """

    def __init__(self, combine: Callable[[Sequence[Tensors], Sequence[float]], Tensors]) -> None:
        self._combine = combine
        self._uploads: list[Tensors] = []
        self._weights: list[float] = []

    @override
    def add(self, tensors: Released, weight: float) -> None:
        self._uploads.append(tensors)
        self._weights.append(weight)

    @override
    def result(self) -> Tensors:
        return self._combine(self._uploads, self._weights)
