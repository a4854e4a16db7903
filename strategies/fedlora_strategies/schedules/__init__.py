"""Schedules, which say what changes from round to round: each file of this folder is one.

A file defines `SCHEDULE`, a frozen dataclass that fits the protocol `Schedule`. A schedule sees nothing but the
server's state, so everything it does is post-processing. Noise, sampling rate, clip norm and the number of steps never
depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors


class Schedule(Protocol):
    """A plan of what trains in which round. It is a frozen dataclass whose fields are numbers: the user's options.

    Attributes:
        refreshes_frozen: Whether `between` changes the adapters' frozen tensors, so that they must be sent again.
        form: What --ranks takes to choose this schedule, as in "grow:TOTAL"; "" if it leaves ranks alone.
    """

    refreshes_frozen: ClassVar[bool]
    form: ClassVar[str]

    def check(self, layout: AdapterLayout) -> None:
        """Check that the schedule can work with adapters of this layout.

        Raises:
            ValueError: It cannot.
        """

    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        """Return the names of the trained tensors that clients train and upload in a round; empty for all.

        Clients also receive the other trained tensors, and keep them as they are.

        Args:
            round: The round's number, from 1.
            layout: The adapters' tensors.
        """

    def prefixes(self, round: int, layout: AdapterLayout, own: Tensors, rng: np.random.Generator) -> Mapping[str, int]:
        """Return the modules of which only the first ranks take part in a round, and how many; {} if all do.

        Clients neither get nor send the rest of their trained tensors, and compute without it.

        Args:
            round: The round's number, from 1.
            layout: The adapters' tensors.
            own: The schedule's memory.
            rng: Random numbers that depend on nothing but the run's seed and the round.
        """

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        """Return the memory before the first round."""

    def between(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
                rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        """Return the state and the memory that the next round starts from.

        Args:
            state: The state after the server step of `round`.
            layout: The adapters' tensors.
            own: The schedule's memory.
            round: The number of the round that is over.
            rng: Random numbers that depend on nothing but the run's seed and the round.
        """
