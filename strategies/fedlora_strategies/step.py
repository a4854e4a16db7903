"""The server step: reduction, optimiser and refactorisation one after the other, then the schedule.

    u_k, w_k        uploads and weights of the round, one at a time in order of node id
    reduced         the reduction of all (u_k, w_k)
    trained         reduced, or x + the optimiser's answer to Δ = reduced − what clients were sent
    state           trained and frozen, refactorised: the same update in other coordinates
    next state      what the schedule makes of it

Each may have a memory of its own: named arrays that are kept over rounds and in the checkpoint, as "<slot>/<name>". All
of it is computed from what has left the clients, and is post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Released, Tensors

from .reductions import Reduction
from .refactorizations import Refactorization
from .schedules import Schedule
from .server_optimizers import ServerOptimizer


@dataclass(frozen=True)
class ServerStep:
    """What the server does with the uploads of a round; a value, whose memory is given to it and back.

    Attributes:
        rounds: how many are planned, over which an optimiser's rate may fall.
        seed: of what the schedule draws.
    """

    layout: AdapterLayout
    reduction: Reduction
    optimizer: ServerOptimizer | None
    refactorization: Refactorization | None
    schedule: Schedule
    rounds: int
    seed: int

    def __post_init__(self) -> None:
        if self.refactorization is not None:
            self.refactorization.check(self.layout)

    @property
    def linear(self) -> bool:
        """Whether it needs nothing but the weighted sum of the uploads: the rest takes what the reduction gives."""
        return self.reduction.linear

    @property
    def refreshes_frozen(self) -> bool:
        """Whether the adapters' frozen tensors change between rounds, and travel again."""
        return self.schedule.refreshes_frozen or (
            self.refactorization is not None and self.refactorization.refreshes_frozen)

    def trains(self, round: int) -> frozenset[str]:
        """Names of the trained tensors that train in the round; empty for all.

        Raises:
            ValueError: the schedule names others.
        """
        active = self.schedule.trains(round, self.layout)
        if unknown := active - {spec.name for spec in self.layout.trained}:
            raise ValueError(f"the schedule has {sorted(unknown)[0]!r} train in round {round}, which is no trained "
                             "tensor of the adapters")
        return active

    def begin(self, state: Tensors) -> Tensors:
        """The memory before the first round, from the run's first state."""
        trained = {spec.name: state[spec.name] for spec in self.layout.trained}
        return {
            **_named("optimizer", self.optimizer.begin(trained) if self.optimizer else {}),
            **_named("refactorization",
                     self.refactorization.begin(self.layout, state) if self.refactorization else {}),
            **_named("schedule", self.schedule.begin(self.layout, state))}

    def combine(self, reduced: Released, sent: Tensors, state: Tensors, own: Tensors,
                round: int) -> tuple[Tensors, Tensors]:
        """The tensors that trained in the round, as they are now, and the next memory.

        Args:
            reduced: what the reduction made of the uploads.
            sent: the same tensors as clients were sent them: rounded where bf16 travels.
            state: the server's own.
            own: the memory.
        """
        if self.optimizer is None:
            return reduced, own
        gradient = {name: array.astype(np.float64) - sent[name] for name, array in reduced.items()}
        progress = (min(round, self.rounds) - 1) / self.rounds
        change, memory = self.optimizer.step(gradient, _of("optimizer", own), progress)
        with np.errstate(over="ignore"):  # the state is checked
            moved = {name: (state[name] + change[name]).astype(state[name].dtype) for name in reduced}
        return moved, {**own, **_named("optimizer", memory)}

    def rewrite(self, state: Tensors, own: Tensors, round: int) -> tuple[Tensors, Tensors]:
        """The state and the memory that the next round starts from.

        Args:
            state: with the tensors of `combine`; frozen ones as clients held them.
        """
        if self.refactorization is not None:
            state, memory, factors = self.refactorization.apply(state, self.layout, _of("refactorization", own), round)
            own = {**own, **_named("refactorization", memory)}
            if self.optimizer is not None and factors:
                own = {**own, **_named("optimizer", self.optimizer.turn(_of("optimizer", own), factors))}
        rng = np.random.default_rng((self.seed, round))
        state, memory = self.schedule.between(state, self.layout, _of("schedule", own), round, rng)
        return state, {**own, **_named("schedule", memory)}


def _named(slot: str, memory: Tensors) -> dict[str, np.ndarray]:
    return {f"{slot}/{name}": array for name, array in memory.items()}


def _of(slot: str, own: Tensors) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{slot}/"): array for name, array in own.items() if name.startswith(f"{slot}/")}
