"""What changes from round to round: one file each, whose `SCHEDULE` is a frozen `Schedule`.

A schedule sees the server's state alone, so that all it does is post-processing. Noise, sampling rate, clip norm and
steps never depend on it.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors


class Schedule(Protocol):
    """What trains when; a frozen dataclass whose fields, numbers, are its options.

    Attributes:
        refreshes_frozen: whether `between` changes the adapters' frozen tensors, which then travel again.
    """

    refreshes_frozen: ClassVar[bool]

    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        """Names of the trained tensors that clients train and upload in this round, counted from 1; empty for all.

        The others are sent to them and stay as they are.
        """

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        """The memory before the first round."""

    def between(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
                rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        """The state and the memory that the next round starts from.

        Args:
            state: after the server step of `round`.
            own: its memory.
            rng: the same for the same seed and round.
        """
