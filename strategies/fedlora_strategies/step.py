"""The server step of a round: reduction, server optimizer, refactorization and schedule, in this order.

    u_k, w_k        uploads and weights of the round, one at a time in order of node id
    reduced         the reduction of all (u_k, w_k)
    trained         reduced; or with a server optimizer x + its step for Δ = reduced − what clients were sent
    state           trained and frozen, refactorized: the same update in other coordinates
    next state      the state after the schedule's changes

Each part may have a memory: named arrays that are kept from round to round and in checkpoints, as "<slot>/<name>".
Everything here is computed from what has left the clients. So it is post-processing and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Released, Tensors

from .reductions import FactorReduction, Reduction
from .refactorizations import Refactorization
from .schedules import Schedule
from .schedules._ranks import active_ranks
from .server_optimizers import ServerOptimizer


@dataclass(frozen=True)
class ServerStep:
    """The server step of a run. It is immutable: the caller passes the memory in and gets the next memory back.

    Attributes:
        layout: The adapters' tensors.
        reduction: Combines the uploads of a round.
        optimizer: The server optimizer; None takes the reduced tensors as they are.
        refactorization: Rewrites the factors between rounds; None leaves them.
        schedule: Says what trains in which round, and changes the state between rounds.
        rounds: The number of planned rounds, over which an optimizer's rate may fall.
        seed: The seed of the random numbers that the refactorization and the schedule draw.

    Raises:
        ValueError: The reduction, the refactorization or the schedule cannot work with adapters of this layout, or with
            each other.
    """

    layout: AdapterLayout
    reduction: Reduction
    optimizer: ServerOptimizer | None
    refactorization: Refactorization | None
    schedule: Schedule
    rounds: int
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.reduction, FactorReduction):
            self.reduction.check(self.layout)
        if self.refactorization is not None:
            self.refactorization.check(self.layout)
        self.schedule.check(self.layout)
        rewrites = self.refactorization is not None or isinstance(self.reduction, FactorReduction)
        if self.schedule.form and (rewrites or self.optimizer is not None):
            other = "a server optimizer" if self.optimizer is not None else "a strategy that rewrites its factors"
            raise ValueError(f"--ranks {self.schedule.form} and {other} exclude each other: it would write to ranks "
                             "that take no part. Choose --server-optimizer none, and ffa-lora or fedavg-lora")

    @property
    def linear(self) -> bool:
        """Whether the step needs only the weighted sum of the uploads. That depends on the reduction alone."""
        return self.reduction.linear

    @property
    def refreshes_frozen(self) -> bool:
        """Whether the adapters' frozen tensors change between rounds, so that they must be sent again."""
        if isinstance(self.reduction, FactorReduction) and self.reduction.refreshes_frozen:
            return True
        return self.schedule.refreshes_frozen or (
            self.refactorization is not None and self.refactorization.refreshes_frozen)

    def trains(self, round: int) -> frozenset[str]:
        """Return the names of the tensors that train in a round; empty for all trained tensors.

        Raises:
            ValueError: The schedule names a tensor that is not trained.
        """
        active = self.schedule.trains(round, self.layout)
        if unknown := active - {spec.name for spec in self.layout.trained}:
            raise ValueError(f"the schedule names {sorted(unknown)[0]!r} to train in round {round}, which is not a "
                             "trained tensor of the adapters; return names from layout.trained")
        return active

    def prefixes(self, round: int, own: Tensors) -> Mapping[str, int]:
        """Return the modules of which only the first ranks take part in a round, and how many.

        Args:
            round: The round's number, from 1.
            own: The memory.
        """
        rng = np.random.default_rng((self.seed, round, 1))  # as a refactorization's, which these schedules exclude
        return self.schedule.prefixes(round, self.layout, _of("schedule", own), rng)

    def forecast(self) -> list[Mapping[str, int]]:
        """Return `prefixes` of each planned round, as they would be if no layer or rank changed more than another."""
        if not self.schedule.form:
            return [{}] * self.rounds
        state: Tensors = {spec.name: np.zeros(spec.shape, np.float32) for spec in self.layout.state}
        own, found = dict(self.begin(state)), list[Mapping[str, int]]()
        for number in range(1, self.rounds + 1):
            found.append(self.prefixes(number, own))
            state, memory = self.rewrite(state, own, number)
            own = dict(memory)
        return found

    def begin(self, state: Tensors) -> Tensors:
        """Return the memory before the first round, made from the run's first state."""
        trained = {spec.name: state[spec.name] for spec in self.layout.trained}
        return {
            **_named("optimizer", self.optimizer.begin(trained) if self.optimizer else {}),
            **_named("refactorization",
                     self.refactorization.begin(self.layout, state) if self.refactorization else {}),
            **_named("schedule", self.schedule.begin(self.layout, state))}

    def combine(self, reduced: Released, sent: Tensors, state: Tensors, own: Tensors,
                round: int) -> tuple[Tensors, Tensors]:
        """Apply the server optimizer to the reduced uploads.

        Args:
            reduced: The reduced uploads.
            sent: The same tensors as clients were sent them: rounded in a bf16 run.
            state: The state, as the server holds it.
            own: The memory.
            round: The round's number, from 1.

        Returns:
            The new values of the tensors that trained in the round, and the next memory.
        """
        if self.optimizer is None:
            with np.errstate(over="ignore"):  # the caller checks that the state is finite
                return {name: array.astype(state[name].dtype, copy=False) for name, array in reduced.items()}, own
        gradient = {name: array.astype(np.float64) - sent[name] for name, array in reduced.items()}
        progress = (min(round, self.rounds) - 1) / self.rounds
        change, memory = self.optimizer.step(gradient, _of("optimizer", own), progress)
        with np.errstate(over="ignore"):
            moved = {name: (state[name] + change[name]).astype(state[name].dtype) for name in reduced}
        return moved, {**own, **_named("optimizer", memory)}

    def rewrite(self, state: Tensors, own: Tensors, round: int) -> tuple[Tensors, Tensors]:
        """Apply the refactorization and the schedule after a round.

        Args:
            state: The state with the tensors from `combine`; its frozen tensors as clients held them.
            own: The memory.
            round: The number of the round that is over.

        Returns:
            The state and the memory that the next round starts from.
        """
        if self.refactorization is not None:
            rng = np.random.default_rng((self.seed, round, 1))
            state, memory, factors = self.refactorization.apply(state, self.layout, _of("refactorization", own), round,
                                                                rng)
            own = {**own, **_named("refactorization", memory)}
            if self.optimizer is not None and factors:
                own = {**own, **_named("optimizer", self.optimizer.turn(_of("optimizer", own), factors))}
        rng = np.random.default_rng((self.seed, round))
        state, memory = self.schedule.between(state, self.layout, _of("schedule", own), round, rng)
        return state, {**own, **_named("schedule", memory)}


def kept_ranks(layout: AdapterLayout, own: Tensors) -> dict[str, int]:
    """Return module → rank, for the modules of which only the first ranks belong to the adapter.

    Args:
        layout: The adapters' tensors.
        own: The server step's memory.
    """
    return active_ranks(layout, _of("schedule", own))


def _named(slot: str, memory: Tensors) -> dict[str, np.ndarray]:
    return {f"{slot}/{name}": array for name, array in memory.items()}


def _of(slot: str, own: Tensors) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{slot}/"): array for name, array in own.items() if name.startswith(f"{slot}/")}
