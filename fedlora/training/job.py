"""The inputs and the results of one client's training in one round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedlora.plan import RunPlan, Tensors
from fedlora.privacy.rng import RandomStream
from fedlora.secure_sum.integers import Grid
from fedlora.tasks import Records

ROWS_PER_UNIT = 8
"""Default for the most records that one unit of privacy contributes to a step."""


class Streams(Protocol):
    """The source of a client's random numbers, for example `fedlora.privacy.RunStreams`."""

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """Return the stream for "sampling", "noise" or "hold-out" of a round and attempt.

        An implementation may return a fresh stream for every call, or continue the one it returned before.
        """


@dataclass(frozen=True)
class Encoding:
    """The form in which a client gives its clipped sum to a secure sum: integers, with the client's noise.

    Attributes:
        grid: The integers of the run.
        deviation: The standard deviation of the noise before it is rounded, in units of the grid.
    """

    grid: Grid
    deviation: float


@dataclass(frozen=True)
class TrainingJob:
    """One client's training task for one round, complete enough to run in any process.

    Its privacy cost is charged before the job is made. A job may be trained once: a second training would release
    results that nobody has paid for.

    Attributes:
        run: The run's plan.
        records: The client's training records.
        start: Every tensor that is not in the base checkpoint, with its value at the start of the round. None starts
            from the values that the model holds now.
        sampling_rate: q, the probability with which Poisson sampling includes a unit in a step. The summed gradient is
            divided by the plan's expected batch, in units.
        noise_multiplier: sigma, in units of the clip norm. None trains without privacy: no clipping and no noise.
        clip_norm: The client's clip norm (L2), at most the plan's.
        streams: The source of random numbers. `round` and `attempt` select the streams.
        round: The round's number, from 1; 0 for a private start.
        attempt: The number of the attempt at this round, from 0.
        lr: The round's learning rate. None takes the plan's.
        rows_per_unit: The most records of one unit in a step. Unused where `records.units` is None.
        active: The names of the tensors to train in this round. () trains all that the layout marks as trained.
        prefixes: (module, rank) of the adapted modules of which only the first ranks are used and trained in this
            round. `start` has their tensors in that rank.
        encoding: The integers that the clipped sum of the job's one step becomes, with noise. No tensor changes then,
            and the result holds the integers alone. None steps the tensors.
        held_out: The client's records that are scored in place of being trained on; None in a plan without a hold-out.

    Raises:
        ValueError: The sampling rate is out of range, or a job with an encoding is not private or has several steps.
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
    prefixes: tuple[tuple[str, int], ...] = ()
    encoding: Encoding | None = None
    held_out: Records | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate!r}; it must be in (0, 1]")
        if self.encoding is not None and not (self.private and self.run.local_steps == 1):
            raise ValueError("a secure sum takes the clipped and noised sum of one step: it needs privacy and "
                             f"--local-steps 1, not {self.run.local_steps}")
        if (self.held_out is not None) != bool(self.run.counted):
            raise ValueError(f"the plan holds out a share of {self.run.hold_out:g}, and the job has "
                             f"{'no ' if self.held_out is None else ''}held-out records")

    @property
    def private(self) -> bool:
        """Whether this job clips and adds noise."""
        return self.noise_multiplier is not None

    @property
    def rows_of_a_unit(self) -> int:
        """The most records of one unit in a step; 1 where each record is a unit of its own."""
        return 1 if self.records.units is None else self.rows_per_unit

    @property
    def rate(self) -> float:
        """The learning rate of the round."""
        return self.run.lr if self.lr is None else self.lr

    def stream(self, purpose: str) -> RandomStream:
        """Return this round's random stream for "sampling", "noise" or "hold-out"."""
        return self.streams.stream(self.round, purpose, self.attempt)


@dataclass(frozen=True)
class TrainResult:
    """The result of one client's training in one round. Under privacy only `tensors` and `steps` may leave the machine.

    Attributes:
        tensors: The trained tensors, by name; of a job with an encoding, `SUM` → [values] int64 alone. Its values are
            those of the trained tensors in order of their names, each in C order.
        steps: The number of optimizer steps done; fewer than planned if training was stopped.
        drawn: The number of units drawn in each step.
        mean_loss: The mean loss over the drawn records; nan if none was drawn.
        clipped_share: The share of drawn units whose gradient was longer than the clip norm; 0.0 without privacy.
        nonfinite: The number of drawn records whose gradient was not finite. They count as zero in the sum.
    """

    tensors: Tensors
    steps: int
    drawn: tuple[int, ...]
    mean_loss: float
    clipped_share: float
    nonfinite: int
