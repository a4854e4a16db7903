"""What a client trains in one round, and what that gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedlora.plan import RunPlan, Tensors
from fedlora.privacy.rng import RandomStream
from fedlora.tasks import Records

ROWS_PER_UNIT = 8
"""Most records of one unit in a step, where it is not given."""


class Streams(Protocol):
    """Where a client's random numbers come from; `fedlora.privacy.RunStreams` is one."""

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """For "sampling" or "noise" of a round; each call makes it anew, or goes on with it."""


@dataclass(frozen=True)
class TrainingJob:
    """What one client trains in one round: settled, charged, and good for one training in any process.

    Attributes:
        run, records: of the client.
        start: the tensors to start from, all that is not in the base checkpoint; None for those that the model holds.
        sampling_rate: q of Poisson sampling over units; the step is divided by the plan's expected batch of units.
        noise_multiplier: None trains without privacy: no clipping, no noise.
        clip_norm: the client's, at most the plan's.
        streams, round, attempt: where the random numbers come from.
        lr: the round's learning rate; None for the plan's.
        rows_per_unit: most records of one unit in a step; of no meaning where `records.units` is None.
        active: names of the trained tensors that train; () for all.
    """

    run: RunPlan
    records: Records
    start: Tensors | None
    sampling_rate: float
    noise_multiplier: float | None
    clip_norm: float
    streams: Streams
    round: int = 1
    attempt: int = 0
    lr: float | None = None
    rows_per_unit: int = ROWS_PER_UNIT
    active: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate!r}; it must be in (0, 1]")

    @property
    def private(self) -> bool:
        return self.noise_multiplier is not None

    @property
    def rows_of_a_unit(self) -> int:
        """Most records of one unit in a step; 1 where each record is a unit."""
        return 1 if self.records.units is None else self.rows_per_unit

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.run.lr if self.lr is None else self.lr

    def stream(self, purpose: str) -> RandomStream:
        """For "sampling" or "noise"."""
        return self.streams.stream(self.round, purpose, self.attempt)


@dataclass(frozen=True)
class TrainResult:
    """What a round gave. Under privacy only `tensors` and `steps` may leave the machine.

    Attributes:
        tensors: the tensors that were trained.
        steps: optimiser steps done; fewer than planned if training was stopped.
        drawn: number of units of each step.
        mean_loss: over the drawn records; nan if there were none.
        clipped_share: share of drawn units whose gradient was longer than the clip norm; 0.0 without privacy.
        nonfinite: drawn records whose gradient was not finite, and counted as zero.
    """

    tensors: Tensors
    steps: int
    drawn: tuple[int, ...]
    mean_loss: float
    clipped_share: float
    nonfinite: int
