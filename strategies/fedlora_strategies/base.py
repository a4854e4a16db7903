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

They are measured while they are reduced. Where screening leaves one out, all others are read and reduced once more; so
they are, by a stricter measure, where the state that they give is no good.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapters import AdapterLayout
from fedlora.adapters.layout import MOST_RECEIVED, MOST_VALUE
from fedlora.plan import Refusal, Released, RoundPlan, RunPlan, Tensors, Upload, upload_metrics
from fedlora.wire import tensors_digest

from .for_model import Ready, ready
from .messages import read_reply, to_record, to_tensors, train_messages
from .recipe import Recipe
from .reductions import Gathering
from .screening import (
    COMPARED,
    EXAMPLES,
    PLAIN,
    PRIVATE,
    Measured,
    Reach,
    left_out,
    most_examples,
    reach_of,
    usual_norm,
)
from .step import ServerStep
from .under_way import Closed, Figures, UnderWay, distance

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """Numbers of values that one client moves: `up` and `down` each round, `once` more with its first round."""

    up: int
    down: int
    once: int


class Diverged(ValueError):
    """The uploads of a round give no state that could be gone on from, whichever of them are left out."""


class FederatedLoRA(Strategy):
    """A Flower strategy for one FedLoRA run.

    Attributes:
        recipe: what it is made of.
        memory: what the server step keeps over rounds, by name; empty before the first one.
        rejected: node id → why its reply of the last round added nothing.
        curbed: node id → for how few examples its upload of the last round counts.
        disclosed: node id → what its accepted upload of the last round said beside the tensors.
        screen: k of `screening`; infinite takes every upload.
        usual_norms: of the rounds so far, with which those of few uploads are compared.
        uncompared: whether the last round's uploads were too few to compare, with each other or with earlier ones.

    Args:
        plan: the run.
        layout: names and shapes of the adapted model's tensors.
        recipe: None for the class's own.
        seed: of what a schedule draws.
        min_nodes: with plain `start(grid, …)`, round 1 waits for this many nodes.
        options: other values for the recipe's own, as in `FedSVD(plan, layout, period=2)`.
    """

    recipe: ClassVar[Recipe]
    sends_changes: ClassVar[bool] = False
    """Whether an upload is by how much the tensors moved, in place of where they are."""

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
        self.curbed: dict[int, str] = {}
        self.disclosed: dict[int, dict[str, int | float]] = {}
        self.screen = PRIVATE if plan.private else PLAIN
        self.usual_norms: tuple[float, ...] = ()
        self.uncompared = False
        self._closed: Closed | None = None
        self._held: dict[int, str] = {}
        self._frozen: tuple[Tensors, str] = ({}, "")
        self._round: UnderWay | None = None

    @classmethod
    def for_model(cls, model: str, **settings: Any) -> Ready[Self]:
        """Everything that a ServerApp needs: see `fedlora_strategies.for_model.ready`."""
        return ready(cls, model, **settings)

    @property
    def linear(self) -> bool:
        """Whether the server step needs nothing but the weighted sum of the uploads; only then can secure aggregation
        serve it.
        """
        return self.step.linear

    @property
    def exact(self) -> bool:
        """Whether the mean of the merged models is the merged mean."""
        return self.layout.family.exact

    @property
    def trained_by(self) -> RunPlan:
        """What clients compute by, of the plan."""
        return self.plan

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
            config: optionally `nodes` (ids, default all of the grid), `attempt` (default 0), and `deadline_s`, for how
                many seconds from now answers are waited for (default: for ever).
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
        until = time.monotonic() + cast(float, config.get("deadline_s", math.inf))
        order = RoundPlan(self.plan, server_round, attempt, under_way.frozen_sha256, some, until)
        return list(train_messages(order, ((node, under_way.arrays_for(self._held.get(node))) for node in nodes)))

    def _begin(self, server_round: int, arrays: ArrayRecord) -> UnderWay:
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
        layout = self.layout.activated(active) if active else self.layout
        return UnderWay(server_round, trained, received, frozen, layout, self._frozen[1], arrays, changed,
                        before_sha256, set())

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        while len(nodes := list(grid.get_node_ids())) < self.min_nodes:
            time.sleep(1.0)
        return nodes

    def aggregate_train(self, server_round: int,
                        replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next state, or (None, None) if no reply could be used.

        Each reply is checked whole before any of it is added. One that is an error, that answers another order, whose
        tensors are missing, misshaped or not finite, or that screening leaves out adds nothing and is named in
        `rejected`.

        Args:
            replies: if they can be gone through again, they are read one at a time; else all wait in memory.

        Raises:
            Diverged: what they give is not finite, or beyond what can be gone on from.
        """
        under_way, self._round = self._round, None
        if under_way is None or under_way.number != server_round:
            raise ValueError(f"round {server_round} was not configured; call configure_train before aggregate_train")
        replies = list(replies) if isinstance(replies, Iterator) else replies
        self.disclosed = {}
        self._closed = Closed(under_way, self.memory, self.usual_norms, self.screen)
        try:
            return self._combine(self._closed, replies)
        except Diverged as no_state:
            return self.aggregate_again(server_round, replies, str(no_state))

    def aggregate_again(self, server_round: int, replies: Iterable[Message],
                        why: str) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next state of the round that was aggregated last, its uploads screened by half the measure.

        Args:
            replies: those that `aggregate_train` was given.
            why: its state is not taken.

        Raises:
            Diverged: this is the second time, none is left out that was not before, all are, or what the others give
                cannot be gone on from either. The memory is that of the state before the round.
        """
        closed, taken = self._closed, self.disclosed.keys() - self.rejected.keys()
        assert closed is not None and closed.under_way.number == server_round, "a round is aggregated first"
        try:
            if closed.k != self.screen or math.isinf(closed.k):
                raise Diverged(why)
            self._closed = closed = dataclasses.replace(closed, k=closed.k / 2)
            again = self._combine(closed, replies)
            left = self.disclosed.keys() - self.rejected.keys()
            if not left or left == taken:
                raise Diverged(why)
            return again
        except Diverged:
            self.memory, self.usual_norms = closed.memory, closed.usual_norms
            raise

    def _combine(self, closed: Closed, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Raises Diverged where the state that they give holds what no state can hold."""
        under_way, number = closed.under_way, closed.under_way.number
        gathering, figures = self._gather(replies, under_way, {}, math.inf)
        others, most = self._screen(figures.measured, closed)
        if others or any((one.examples or 0) > most for one in figures.measured.values()):
            del gathering  # the next one takes its memory
            gathering, figures = self._gather(replies, under_way, others, most)
        if not figures.replies:
            return None, None
        before = {**under_way.trained, **under_way.frozen}
        moved, memory = self.step.combine(Released(gathering.result()), under_way.sent, before, closed.memory, number)
        try:
            under_way.active.check(moved, "trained", MOST_VALUE)
            state, memory = self.step.rewrite({**before, **moved}, memory, number)
            self.layout.check(state, "state", MOST_RECEIVED if self.plan.private else MOST_VALUE)  # as clients do
        except ValueError as error:
            raise Diverged(str(error)) from None
        usual = usual_norm([one.norm for one in figures.measured.values()])
        self.memory = memory
        self.usual_norms = closed.usual_norms if usual is None else (*closed.usual_norms, usual)
        metrics = {**figures.to_dict(), "rejected": len(self.rejected),
                   "update_norm": distance(moved, under_way.trained)}
        metrics |= {} if usual is None else {"usual_norm": usual}
        return to_record({spec.name: state[spec.name] for spec in self.layout.state}), MetricRecord({**metrics})

    def _gather(self, replies: Iterable[Message], under_way: UnderWay, others: Mapping[int, str],
                most_examples: float) -> tuple[Gathering, Figures]:
        """Reduce all uploads but those of `others`, each of which says why it is left out."""
        self.rejected, self.curbed = dict(others), {}
        gathering, figures = self.step.reduction.begin(), Figures()
        for node, upload in self._in_order(replies, under_way):
            examples = upload.num_examples if self.plan.weight_by_examples else None
            if examples is not None and examples > most_examples:
                self.curbed[node] = (f"it counts for {most_examples:.0f} examples, {EXAMPLES:g} times the lower median "
                                     f"of the round's uploads, in place of {examples}")
            gathering.add(upload.tensors, 1.0 if examples is None else min(float(examples), most_examples))
            norm = distance(upload.tensors, {} if self.sends_changes else under_way.sent)
            figures.add(upload, node, Measured(norm, upload.noise_multiplier, examples))
        return gathering, figures

    def _screen(self, measured: Mapping[int, Measured], closed: Closed) -> tuple[dict[int, str], float]:
        """Which uploads are left out, and what one counts for at most."""
        if math.isinf(self.screen):
            return {}, math.inf
        reach, stricter = self._reach(closed.under_way), closed.k != self.screen
        self.uncompared = not reach.bounded and len(measured) < COMPARED and not closed.usual_norms
        return left_out(measured, closed.k, closed.usual_norms, reach, among_few=stricter), most_examples(measured)

    def _reach(self, under_way: UnderWay) -> Reach:
        """How far the training of this round can go."""
        lr = RoundPlan(self.trained_by, under_way.number, 0, under_way.frozen_sha256).lr
        return reach_of(self.trained_by, under_way.active, lr, distance(under_way.sent, {}))

    def _in_order(self, replies: Iterable[Message], under_way: UnderWay) -> Iterator[tuple[int, Upload]]:
        """The valid uploads by ascending node id; those of nodes that are still awaited hold back the later ones. Of
        nodes that are in `rejected` already nothing is read.
        """
        early: dict[int, Upload] = {}
        awaited = set(under_way.awaited)
        turn = sorted(awaited, reverse=True)
        for message in replies:
            node = message.metadata.src_node_id
            if node not in awaited:
                continue
            try:
                if node not in self.rejected:
                    early[node] = self._accept(message, node, under_way)
            except ValueError as error:
                self.rejected[node] = str(error)
            awaited.discard(node)
            del message
            while turn and turn[-1] not in awaited:
                if (upload := early.pop(of := turn.pop(), None)) is not None:
                    yield of, upload
        for node in sorted(early):
            yield node, early.pop(node)

    def _accept(self, message: Message, node: int, under_way: UnderWay) -> Upload:
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


def _some(names: Iterable[str]) -> str:
    """At most three of the names, and how many more."""
    known = sorted(names)
    return (", ".join(known[:3]) or "none") + (f" and {len(known) - 3} more" if len(known) > 3 else "")
