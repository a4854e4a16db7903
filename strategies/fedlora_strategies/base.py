"""What all strategies share: who is asked, what travels, and what is accepted of what comes back.

A strategy is a recipe: an adapter family plus a server step. This file translates messages; what is computed is in
`step` and in one file for each part.

    state    every tensor that is not in the base checkpoint = trained + frozen, as one ArrayRecord between rounds
    trained  moved by the clients, uploaded by each, averaged; where a schedule says so, some of them alone in a round
    frozen   the same for everybody and frozen during a round; a node is sent only those that it does not hold yet
    memory   what the server step keeps for itself; it does not travel

What travels in a bf16 run is rounded (`fedlora.wire.dtypes`). The server's own state stays float32. Clients start from
the rounded values and train against the rounded frozen tensors, so the server step takes the frozen tensors as they
were sent.

Uploads are reduced in order of node id (a hash of the client's name), never in order of arrival. A reply that comes
before its turn waits in memory, so that an engine that gives replies in that order keeps memory flat.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapters import AdapterLayout
from fedlora.adapters.layout import MOST_VALUE
from fedlora.plan import Refusal, Released, RoundPlan, RunPlan, Tensors, Upload, upload_metrics
from fedlora.wire import tensors_digest

from .for_model import Ready, ready
from .messages import read_reply, to_record, to_tensors, train_messages
from .recipe import Recipe
from .step import ServerStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """Numbers of values that one client moves: `up` and `down` each round, `once` more with its first round."""

    up: int
    down: int
    once: int


@dataclass
class _Round:
    """The round that is under way: what was sent, and from which nodes a reply may still come.

    `trained` is the server's own, `sent` what clients start from; `frozen` and `arrays` are what clients are sent, and
    hold. `active` are those of `trained` that train in this round: the layout of what is uploaded.
    """

    number: int
    trained: Tensors
    sent: Tensors
    frozen: Tensors
    active: AdapterLayout
    frozen_sha256: str
    arrays: ArrayRecord
    changed: frozenset[str]
    before_sha256: str
    awaited: set[int]
    _records: dict[frozenset[str], ArrayRecord] = field(default_factory=dict)

    def arrays_for(self, held_sha256: str | None) -> ArrayRecord:
        """What a node must be sent that holds the frozen tensors of this digest: the trained, and those it lacks.

        Of the frozen ones none to a node that holds this round's, the changed ones to one that holds the last
        round's, else all. Nodes that lack the same share one record.
        """
        lacking = {self.frozen_sha256: frozenset(), self.before_sha256: self.changed}.get(
            held_sha256 or "", frozenset(self.frozen))
        if lacking not in self._records:
            names = (*self.trained, *sorted(lacking))
            self._records[lacking] = ArrayRecord({name: self.arrays[name] for name in names})
        return self._records[lacking]


class FederatedLoRA(Strategy):
    """A Flower strategy for one FedLoRA run.

    Attributes:
        recipe: what it is made of.
        memory: what the server step keeps over rounds, by name; empty before the first one.
        rejected: node id → why its reply of the last round added nothing.
        disclosed: node id → what its accepted upload of the last round said beside the tensors.

    Args:
        plan: the run.
        layout: names and shapes of the adapted model's tensors.
        recipe: None for the class's own.
        seed: of what a schedule draws.
        min_nodes: with plain `start(grid, …)`, round 1 waits for this many nodes.
        options: other values for the recipe's own, as in `FedSVD(plan, layout, period=2)`.
    """

    recipe: ClassVar[Recipe]

    def __init__(self, plan: RunPlan, layout: AdapterLayout, *, recipe: Recipe | None = None, seed: int = 0,
                 min_nodes: int = 1, **options: float) -> None:
        chosen = (recipe or self.recipe).with_options(options)
        for given in (plan.family, layout.family.name):
            if given != chosen.family:
                raise ValueError(f"the adapter family is {given!r}; {type(self).__name__} needs {chosen.family!r}. "
                                 "Attach the adapters with the family of the plan's strategy")
        self.plan, self.layout, self.min_nodes = plan, layout, min_nodes
        self.step: ServerStep = chosen.step(layout, plan.rounds, seed)
        self.described = chosen.described()
        self.memory: Tensors = {}
        self.rejected: dict[int, str] = {}
        self.disclosed: dict[int, dict[str, int | float]] = {}
        self._held: dict[int, str] = {}
        self._frozen: tuple[Tensors, str] = ({}, "")
        self._round: _Round | None = None

    @classmethod
    def for_model(cls, model: str, **settings: Any) -> Ready[Self]:
        """Everything that a ServerApp needs: see `fedlora_strategies.for_model.ready`."""
        return ready(cls, model, **settings)

    @property
    def linear(self) -> bool:
        """Whether the server step needs nothing but the weighted sum of the uploads; only then can secure aggregation
        serve it."""
        return self.step.linear

    @property
    def exact(self) -> bool:
        """Whether the mean of the merged models is the merged mean."""
        return self.layout.family.exact

    def take_up(self, memory: Tensors, state: Tensors) -> None:
        """Go on with the memory that an earlier server kept with this state.

        Raises:
            ValueError: it is not the memory of this server step.
        """
        expected = self.step.begin(state)
        if {name: (array.shape, array.dtype) for name, array in memory.items()} != {
                name: (array.shape, array.dtype) for name, array in expected.items()}:
            raise ValueError("the checkpoint holds the memory of another server step: "
                             f"{_some(memory)} in it, {_some(expected)} for this one. Leave --server-optimizer and "
                             "--strategy-options as they were when the run was begun")
        self.memory = memory

    @property
    def traffic(self) -> Traffic:
        """Values per client and round, as in the communication table of METHODS."""
        up = self.layout.num_trained
        moved = sum(spec.size for spec in self.layout.frozen if self.step.refreshes_frozen and spec.group == "adapter")
        return Traffic(up, up + moved, sum(spec.size for spec in self.layout.frozen) - moved)

    def forget(self, node_id: int) -> None:
        """The node does not hold the frozen tensors (any more): they travel with its next message."""
        self._held.pop(node_id, None)

    def expect_none_of(self, node_ids: Iterable[int]) -> None:
        """No reply will come from these nodes in this round: the others' replies need not wait for theirs."""
        if self._round:
            self._round.awaited.difference_update(node_ids)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord,
                        grid: Grid) -> list[Message]:
        """The orders for one attempt of a round. A list, for Flower's own grid goes through them twice.

        Args:
            server_round: counted from 1.
            arrays: the state.
            config: optionally `nodes` (ids, default all of the grid) and `attempt` (default 0).
            grid: asked for its nodes if `nodes` is absent.
        Raises:
            ValueError: the state does not fit the layout.
        """
        if self._round is None or self._round.number != server_round:
            self._round = self._begin(server_round, arrays)
        under_way = self._round
        given = cast(list[int], config["nodes"]) if "nodes" in config else self._wait_for_nodes(grid)
        nodes, attempt = sorted(given), cast(int, config.get("attempt", 0))
        under_way.awaited.update(nodes)
        some = () if under_way.active is self.layout else tuple(spec.name for spec in under_way.active.trained)
        order = RoundPlan(self.plan, server_round, attempt, under_way.frozen_sha256, some)
        return list(train_messages(order, ((node, under_way.arrays_for(self._held.get(node))) for node in nodes)))

    def _begin(self, server_round: int, arrays: ArrayRecord) -> _Round:
        state, wire_dtype = to_tensors(arrays), self.plan.wire_dtype
        self.layout.check(state, "state")
        if wire_dtype != "fp32":
            arrays = to_record(state, wire_dtype)
        sent = to_tensors(arrays, wire_dtype)
        if server_round <= 1 or not self.memory:
            self.memory = self.step.begin(state)
        trained, received = ({spec.name: of[spec.name] for spec in self.layout.trained} for of in (state, sent))
        frozen = {spec.name: sent[spec.name] for spec in self.layout.frozen}
        before, before_sha256 = self._frozen
        changed = frozenset(name for name, array in frozen.items()
                            if name not in before or not np.array_equal(array, before[name]))
        self._frozen = frozen, tensors_digest(frozen)
        active = self.step.trains(server_round)
        return _Round(server_round, trained, received, frozen, self.layout.activated(active) if active else self.layout,
                      self._frozen[1], arrays, changed, before_sha256, set())

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        while len(nodes := list(grid.get_node_ids())) < self.min_nodes:
            time.sleep(1.0)
        return nodes

    def aggregate_train(self, server_round: int,
                        replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next state, or (None, None) if no reply could be used.

        Each reply is checked whole before any of it is added. One that is an error, that answers another order, or
        whose tensors are missing, misshaped or not finite adds nothing and is named in `rejected`.
        """
        under_way, self._round = self._round, None
        self.rejected, self.disclosed = {}, {}
        if under_way is None or under_way.number != server_round:
            raise ValueError(f"round {server_round} was not configured; call configure_train before aggregate_train")
        gathering, figures = self.step.reduction.begin(), _Figures()
        for upload in self._in_order(replies, under_way):
            weight = float(upload.num_examples or 1) if self.plan.weight_by_examples else 1.0
            gathering.add(upload.tensors, weight)
            figures.add(upload)
        if not figures.replies:
            return None, None
        before = {**under_way.trained, **under_way.frozen}
        moved, memory = self.step.combine(Released(gathering.result()), under_way.sent, before, self.memory,
                                          server_round)
        state, self.memory = self.step.rewrite({**before, **moved}, memory, server_round)
        self.layout.check(state, "state")
        metrics = {**figures.to_dict(), "rejected": len(self.rejected),
                   "update_norm": _distance(moved, under_way.trained)}
        return to_record({spec.name: state[spec.name] for spec in self.layout.state}), MetricRecord({**metrics})

    def _in_order(self, replies: Iterable[Message], under_way: _Round) -> Iterator[Upload]:
        """The valid uploads by ascending node id; those of nodes that are still awaited hold back the later ones."""
        early: dict[int, Upload] = {}
        turn = sorted(under_way.awaited, reverse=True)
        for message in replies:
            node = message.metadata.src_node_id
            if node not in under_way.awaited:
                continue
            try:
                early[node] = self._accept(message, node, under_way)
            except ValueError as error:
                self.rejected[node] = str(error)
            under_way.awaited.discard(node)
            del message
            while turn and turn[-1] not in under_way.awaited:
                if (upload := early.pop(turn.pop(), None)) is not None:
                    yield upload
        for node in sorted(early):
            yield early.pop(node)

    def _accept(self, message: Message, node: int, under_way: _Round) -> Upload:
        answer = read_reply(message, self.plan.wire_dtype)
        if isinstance(answer, Refusal):
            if answer.code == "missing-tensors":
                self.forget(node)
            raise ValueError(str(answer))
        if (answer.run_id, answer.round) != (self.plan.run_id, under_way.number):
            raise ValueError(f"the upload is for round {answer.round} of run {answer.run_id}, not for round "
                             f"{under_way.number} of run {self.plan.run_id}")
        disclosed = answer.num_examples is not None or answer.train_loss is not None
        if self.plan.private and disclosed:
            raise ValueError("the upload discloses a number of examples or a loss, which privacy forbids")
        if self.plan.weight_by_examples and (answer.num_examples is None or answer.num_examples < 1):
            raise ValueError(f"the upload's number of examples is {answer.num_examples}; weighting by examples "
                             "needs at least 1")
        under_way.active.check(answer.tensors, "trained")
        self._held[node] = under_way.frozen_sha256
        self.disclosed[node] = upload_metrics(answer)
        return answer

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord,
                           grid: Grid) -> Iterable[Message]:
        """None: clients are not asked for figures about their private data. Evaluate at the server."""
        return ()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Log the run's main values."""
        plan, traffic = self.plan, self.traffic
        log.info("%s: rank %d, %d steps of %s with rate %g per round, %s; per client and round %d values up, %d down",
                 plan.strategy, plan.rank, plan.local_steps, plan.optimizer, plan.lr,
                 "private" if plan.private else "not private", traffic.up, traffic.down)


class _Figures:
    """Sums over the accepted uploads of what they disclose."""

    def __init__(self) -> None:
        self.replies = self.steps = 0
        self.losses: list[float] = []

    def add(self, upload: Upload) -> None:
        self.replies += 1
        self.steps += upload.steps
        if upload.train_loss is not None and abs(upload.train_loss) < MOST_VALUE:
            self.losses.append(upload.train_loss)

    def to_dict(self) -> dict[str, int | float]:
        loss = {"train_loss": math.fsum(self.losses) / len(self.losses)} if self.losses else {}
        return {"replies": self.replies, "steps": self.steps} | loss


def _distance(new: Tensors, old: Tensors) -> float:
    """L2 norm of the change of all trained tensors together."""
    squares = (float(np.sum((new[name].astype(np.float64) - old[name]) ** 2)) for name in sorted(new))
    return math.sqrt(math.fsum(squares))


def _some(names: Iterable[str]) -> str:
    """At most three of the names, and how many more."""
    known = sorted(names)
    return (", ".join(known[:3]) or "none") + (f" and {len(known) - 3} more" if len(known) > 3 else "")
