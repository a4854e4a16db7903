"""Usual values of a run, which all strategies share: a data holder can tell from them what a run may cost.

The coordinator may choose others. Those that count are in the server's plan, and in the kit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The number of rounds and steps of a run, and the number of records in a step; see `RunPlan`."""

    rounds: int
    local_steps: int
    expected_batch: int


USUAL: Mapping[bool, Schedule] = {True: Schedule(20, 4, 256), False: Schedule(25, 8, 32)}
"""Whether the run is private → its usual schedule."""

ONE_STEP = Schedule(160, 1, 256)
"""The usual schedule of a run in which clients do one step a round and the server's optimizer steps."""

MAX_LENGTH = 128
"""Usual number of tokens kept of a record."""
