"""Refactorizations, which rewrite the adapters' factors between rounds: each file of this folder is one.

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
    """The result of a refactorization.

    Attributes:
        state: The next state.
        own: The refactorization's next memory.
        factors: For each trained tensor W whose coordinates changed, the matrix M, (r, r) float64, for which W M is the
            same tensor in the new coordinates; None if there is no such matrix. A server optimizer rotates its memory
            of the tensor by M, or begins it anew if M is None.
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
        """Check that the refactorization works with adapters of this layout.

        Raises:
            ValueError: The refactorization does not work with adapters of this layout.
        """

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        """Return the memory before the first round."""

    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
              rng: np.random.Generator) -> Refactored:
        """Rewrite the state after a round.

        Args:
            state: The trained tensors after the round, and the frozen ones as clients held them.
            layout: The adapters' tensors.
            own: The refactorization's memory.
            round: The number of the round that is over.
            rng: Random numbers that depend on nothing but the run's seed and the round.
        """
