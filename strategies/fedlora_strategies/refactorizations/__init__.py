"""Refactorisations, which rewrite the adapters' factors between rounds: each file of this folder is one.

A file defines `REFACTORIZATION`, a frozen dataclass that fits the protocol `Refactorization`. The product of the
factors, which is the update of the model, stays the same. What changes is the coordinates in which clients train it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors


class Refactored(NamedTuple):
    """The result of a refactorisation.

    Attributes:
        state: The next state.
        own: The refactorisation's next memory.
        factors: For each trained tensor W whose coordinates changed: the matrix M, (r, r) float64, such that W M is the
            same tensor in the new coordinates; or None if the change is no such product. A server optimizer's memory
            of the tensor is rotated by M, or begins anew without one.
    """

    state: Tensors
    own: Tensors
    factors: Mapping[str, np.ndarray | None] = {}


class Refactorization(Protocol):
    """A way to rewrite factors. It is a frozen dataclass whose fields are numbers: the user's options.

    Attributes:
        refreshes_frozen: Whether it changes the adapters' frozen tensors, so that they must be sent again.
    """

    refreshes_frozen: ClassVar[bool]

    def check(self, layout: AdapterLayout) -> None:
        """Check that the refactorisation works with adapters of this layout.

        Raises:
            ValueError: It does not.
        """

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        """Return the memory before the first round."""

    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int) -> Refactored:
        """Rewrite the state after a round.

        Args:
            state: The trained tensors after the round, and the frozen ones as clients held them.
            layout: The adapters' tensors.
            own: The refactorisation's memory.
            round: The number of the round that is over.
        """
