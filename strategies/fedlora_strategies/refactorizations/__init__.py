"""How the server rewrites the factors between rounds: one file each, whose `REFACTORIZATION` is a frozen class.

The update that the factors make stays as it is; what changes is in which coordinates clients train it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors


class Refactored(NamedTuple):
    """What a refactorisation leaves.

    Attributes:
        state: the next one.
        own: the next memory.
        factors: trained tensor → M where the coordinates changed, so that what was W is W M now, (r, r) float64; None
            where no matrix on its right says how. An optimiser's memory of that tensor is rotated, or begins anew.
    """

    state: Tensors
    own: Tensors
    factors: Mapping[str, np.ndarray | None] = {}


class Refactorization(Protocol):
    """A way to rewrite factors; a frozen dataclass whose fields, numbers, are its options.

    Attributes:
        refreshes_frozen: whether it changes the adapters' frozen tensors, which then travel again.
    """

    refreshes_frozen: ClassVar[bool]

    def check(self, layout: AdapterLayout) -> None:
        """Raises ValueError where it cannot serve adapters of this layout."""

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        """The memory before the first round."""

    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int) -> Refactored:
        """Rewrite the state after a round.

        Args:
            state: trained tensors as they are now, frozen ones as clients held them.
            own: its memory.
        """
