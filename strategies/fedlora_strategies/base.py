"""The base class of all strategies: it sends the orders of a round, and checks and combines the replies.

A strategy is a recipe: an adapter family plus a server step. This file handles messages. The computation is in `step`
and in one file for each part of the step.

    state    every tensor that is not in the base checkpoint = trained + frozen; one ArrayRecord between rounds
    trained  trained and uploaded by the clients, then averaged; a schedule may train only some of them in a round
    frozen   the same for everybody, and fixed during a round; a node is sent only those that it does not hold yet
    memory   what the server step remembers from round to round; it is never sent

In a bf16 run, tensors are rounded when they are sent (`fedlora.wire.dtypes`), but the server's own state stays float32.
Clients start from the rounded values and train against the rounded frozen tensors. Therefore the server step uses the
frozen tensors as they were sent, and likewise the trained tensors that a schedule leaves idle in a round.

Uploads are reduced in order of node id (a hash of the client's name), never in order of arrival, so that the sum does
not depend on timing. A reply that comes before its turn waits in memory. An engine that delivers replies in order of
node id keeps memory flat.

With secure aggregation the server never sees an upload. It opens the sum of the clients' clipped gradients, which
`aggregate_sum` makes a step of, and nothing is screened.

Uploads are measured while they are reduced. If screening leaves one out, all others are read and reduced again. The
same happens, with a stricter screening, if the resulting state is unusable.
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
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.adapters.layout import MOST_RECEIVED, MOST_VALUE, pasted
from fedlora.plan import Refusal, Released, RoundPlan, RunPlan, Tensors, Upload, upload_metrics
from fedlora.secure_sum import integers
from fedlora.secure_sum.packages import sent_digest
from fedlora.wire import tensors_digest
from fedlora.wire.tensors import split

from .for_model import Ready, ready
from .messages import read_reply, to_record, to_tensors, train_messages
from .recipe import Recipe
from .reductions import FactorReduction, Gathering
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


HELD_OUT = ("held_out_total", "held_out_drawn")
"""Names of the figures that a secure sum tells of held-out records: its last values (`fedlora.training.hold_out`)."""


@dataclass(frozen=True)
class Traffic:
    """The numbers of values that travel between the server and one client.

    Attributes:
        up: Values that the client uploads in each round; the mean over the rounds if these differ. If the uploads
            decide which ranks take part, it is a forecast.
        down: Values that the server sends to the client in each round, with the same remarks.
        once: Values that the server sends only with the client's first round.
    """

    up: int
    down: int
    once: int


@dataclass(frozen=True)
class SumOrder:
    """What the cohort of a secure sum needs to know of its round.

    Attributes:
        values: The number of values in each client's vector: those of the tensors that train in the round.
        sent: The digest of the tensors that the round starts from (`fedlora.secure_sum.packages.sent_digest`).
    """

    values: int
    sent: bytes


class Diverged(ValueError):
    """The error that a round's uploads give no usable next state, even after screening with half the limit."""


class FederatedLoRA(Strategy):
    """A Flower strategy for one FedLoRA run.

    Args:
        plan: The run's plan.
        layout: The names and shapes of the adapted model's tensors.
        recipe: The recipe; None for the class's own.
        seed: The seed of the random numbers that a schedule draws.
        min_nodes: With plain `start(grid, …)`, round 1 waits for this many nodes.
        **options: Values that replace the recipe's own, as in `FedSVD(plan, layout, period=2)`.

    Attributes:
        recipe: The adapter family and the parts of the server step.
        memory: The arrays that the server step keeps from round to round, by name; empty before the first round.
        rejected: Node id → why its reply of the last round was not used.
        curbed: Node id → a note that its upload of the last round counts for fewer examples than it claims.
        disclosed: Node id → the numbers that its accepted upload of the last round told beside the tensors.
        screen: The limit k of `screening`; infinite accepts every upload.
        usual_norms: The usual norm of the uploads in each round so far. Later rounds with few uploads are compared with
            them. If some ranks took no part, it is the norm that uploads of the whole rank would have.
        uncompared: Whether the last round had too few uploads to compare, with each other or with earlier rounds.

    Raises:
        ValueError: The adapters are not of the recipe's family, it has no such option, or the plan has secure
            aggregation and the recipe's reduction needs more than the sum of the uploads.
    """

    recipe: ClassVar[Recipe]
    sends_changes: ClassVar[bool] = False
    """Whether uploads hold the changes of the tensors, and not their new values."""

    def __init__(self, plan: RunPlan, layout: AdapterLayout, *, recipe: Recipe | None = None, seed: int = 0,
                 min_nodes: int = 1, **options: float) -> None:
        chosen = (recipe or self.recipe).with_options(options)
        for given in (plan.family, layout.family.name):
            if given != chosen.family:
                raise ValueError(f"the adapter family is {given!r}; {type(self).__name__} needs {chosen.family!r}. "
                                 "Attach the adapters with the family of the plan's strategy")
        if plan.secure_aggregation:
            chosen.check_linear()
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
        """Load a base model and make everything that a ServerApp needs to train it with this strategy.

        Args:
            model: The base model, as for --model.
            **settings: The other arguments of `fedlora_strategies.for_model.ready`.
        """
        return ready(cls, model, **settings)

    @property
    def linear(self) -> bool:
        """Whether the server step needs only the weighted sum of the uploads, as secure aggregation requires."""
        return self.step.linear

    @property
    def exact(self) -> bool:
        """Whether combining adapters is the same as averaging the models that they are merged into.

        The family must be linear in what is sent in each round, and the reduction must be a weighted mean; or the
        reduction averages the updates themselves, and no optimizer at the server moves the factors elsewhere.
        """
        reduction = self.step.reduction
        if isinstance(reduction, FactorReduction) and reduction.averages_updates(self.layout):
            return self.step.optimizer is None
        return self.step.linear and all(map(self.layout.family.exact_in, self._trained_in_rounds))

    @property
    def _trained_in_rounds(self) -> list[frozenset[str]]:
        """The names of the tensors that train in each planned round."""
        every = frozenset(spec.name for spec in self.layout.trained)
        return [self.step.trains(number) or every for number in range(1, self.plan.rounds + 1)]

    @property
    def trained_by(self) -> RunPlan:
        """The plan by which clients train."""
        return self.plan

    def take_up(self, memory: Tensors, state: Tensors) -> None:
        """Continue with the memory that an earlier server stored with a state.

        Args:
            memory: The stored memory.
            state: The state that it was stored with.

        Raises:
            ValueError: The memory does not fit this server step.
        """
        expected = self.step.begin(state)
        if {name: (array.shape, array.dtype) for name, array in memory.items()} != {
                name: (array.shape, array.dtype) for name, array in expected.items()}:
            raise ValueError("the checkpoint holds the memory of another server step: "
                             f"it holds {_some(memory)}, and this one needs {_some(expected)}. Use the same "
                             "--server-optimizer and --strategy-options as when the run was begun")
        self.memory = memory

    @property
    def traffic(self) -> Traffic:
        """The numbers of values that travel between the server and one client."""
        up, down = [], []
        for names, prefixes in zip(self._trained_in_rounds, self.step.forecast(), strict=True):
            sizes = {spec.name: spec.size for spec in self.layout.narrowed(prefixes).trained}
            up.append(sum(map(sizes.__getitem__, names)))
            down.append(sum(sizes.values()))
        moved = sum(spec.size for spec in self.layout.frozen if self.step.refreshes_frozen and spec.group == "adapter")
        return Traffic(round(sum(up) / len(up)), round(sum(down) / len(down)) + moved,
                       sum(spec.size for spec in self.layout.frozen) - moved)

    def forget(self, node_id: int) -> None:
        """Note that a node does not hold the frozen tensors, so that its next order carries them."""
        self._held.pop(node_id, None)

    def holds_frozen(self, node_id: int) -> None:
        """Note that a node has trained in this round, so that it holds the round's frozen tensors."""
        if self._round:
            self._held[node_id] = self._round.frozen_sha256

    def expect_none_of(self, node_ids: Iterable[int]) -> None:
        """Note that no reply of these nodes will come in this round, so that no other reply waits for theirs."""
        if self._round:
            self._round.awaited.difference_update(node_ids)

    @override
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord,
                        grid: Grid) -> list[Message]:
        """Return the orders to train for one attempt at a round.

        Args:
            server_round: The round's number, from 1; 0 for a private start.
            arrays: The state.
            config: Optional entries: `nodes` (their ids; default: all of the grid), `ranks` (for each of `nodes` how
                many ranks it trains, if these are fewer than the adapter's; default: all), `attempt` (default: 0), and
                `deadline_s` (how many seconds from now replies are accepted; default: for ever).
            grid: Asked for its nodes if `nodes` is absent.

        Returns:
            One order for each node. It is a list because Flower's own grid goes through it twice.

        Raises:
            ValueError: The state does not fit the layout, or the strategy takes no smaller ranks.
        """
        under_way = self._begun(server_round, arrays)
        nodes = cast(list[int], config["nodes"]) if "nodes" in config else self._wait_for_nodes(grid)
        ranks, attempt = cast(list[int], config.get("ranks", [])), cast(int, config.get("attempt", 0))
        under_way.awaited.update(nodes)
        self._share(under_way, dict(zip(nodes, ranks, strict=False)))
        until = time.monotonic() + cast(float, config.get("deadline_s", math.inf))
        alike: dict[int | None, list[int]] = {}
        for node in nodes:
            alike.setdefault(under_way.ranks.get(node), []).append(node)
        messages: list[Message] = []
        for members in alike.values():
            share = under_way.share_of(members[0])
            order = RoundPlan(self.plan, server_round, attempt, under_way.frozen_sha256, under_way.named,
                              tuple(sorted(share.prefixes.items())), until)
            messages += train_messages(order, ((node, share.arrays_for(self._held.get(node))) for node in members))
        return sorted(messages, key=lambda message: message.metadata.dst_node_id)

    def check_ranks(self, ranks: Iterable[int]) -> None:
        """Check that clients can train the first ranks of the adapter alone.

        Args:
            ranks: How many, for each such client.

        Raises:
            ValueError: The strategy needs the whole rank of every client, or the adapter has fewer ranks.
        """
        reduction = self.step.reduction
        if not (isinstance(reduction, FactorReduction) and reduction.takes_ranks):
            raise ValueError(f"--client-ranks: {self.plan.strategy} averages tensors of one shape, so all its clients "
                             "have the same rank; choose --strategy flexlora, which averages products")
        if (most := max(ranks, default=0)) > self.layout.rank:
            raise ValueError(f"--client-ranks has a rank of {most}, and the adapter's is {self.layout.rank}; raise "
                             "--rank, or lower it")

    def _share(self, under_way: UnderWay, ranks: Mapping[int, int]) -> None:
        """Note which nodes train fewer ranks than the adapter has, and make the round as they have it."""
        if smaller := {node: rank for node, rank in ranks.items() if rank < self.layout.rank}:
            self.check_ranks(smaller.values())
            under_way.ranks |= smaller
            for rank in set(smaller.values()) - under_way.narrower.keys():
                under_way.narrower[rank] = self._narrowed(under_way, rank)

    def _narrowed(self, under_way: UnderWay, rank: int) -> UnderWay:
        """Return the round as a client of a smaller rank has it."""
        prefixes = {site.name: rank for site in self.layout.sites if rank < site.rank}
        tensors = self.layout.sent_in(prefixes).cut({**under_way.sent, **under_way.frozen})
        active = self.layout.narrowed(prefixes)
        active = active.activated(under_way.named) if under_way.named else active
        return dataclasses.replace(
            under_way, sent={spec.name: tensors[spec.name] for spec in self.layout.trained}, active=active,
            arrays=to_record(tensors, self.plan.wire_dtype), prefixes=prefixes, ranks={}, narrower={}, _records={},
            longer=under_way.longer * math.sqrt(under_way.active.num_trained / active.num_trained))

    @property
    def summed(self) -> int:
        """The most values in a client's vector of a secure sum: those of a round in which all tensors train."""
        return self.layout.num_trained + self.plan.counted

    def sum_order(self, server_round: int, arrays: ArrayRecord) -> SumOrder:
        """Return what the cohort of a round's secure sum needs to know. It is the same for each attempt at the round.

        Args:
            server_round: The round's number, from 1.
            arrays: The state.
        """
        under_way = self._begun(server_round, arrays)
        return SumOrder(under_way.active.num_trained + self.plan.counted,
                        sent_digest(tensors_digest(under_way.sent), under_way.frozen_sha256))

    def _begun(self, server_round: int, arrays: ArrayRecord) -> UnderWay:
        """Return the round under way; begin it if this is its first attempt."""
        if self._round is None or self._round.number != server_round:
            self._round = self._begin(server_round, arrays)
        return self._round

    def _begin(self, server_round: int, arrays: ArrayRecord) -> UnderWay:
        state, wire_dtype = to_tensors(arrays), self.plan.wire_dtype
        self.layout.check(state, "state")
        if server_round <= 1 or not self.memory:
            self.memory = self.step.begin(state)
        prefixes = self.step.prefixes(server_round, self.memory) if server_round else {}
        if prefixes or wire_dtype != "fp32":
            arrays = to_record(self.layout.sent_in(prefixes).cut(state), wire_dtype)
        sent = to_tensors(arrays, wire_dtype)
        trained, received = ({spec.name: of[spec.name] for spec in self.layout.trained} for of in (state, sent))
        frozen = {spec.name: sent[spec.name] for spec in self.layout.frozen}
        before, before_sha256 = self._frozen
        changed = frozenset(name for name, array in frozen.items()
                            if name not in before or not np.array_equal(array, before[name]))
        self._frozen = frozen, tensors_digest(frozen)
        active = self.step.trains(server_round)
        layout = self.layout.narrowed(prefixes)
        layout = layout.activated(active) if active else layout
        named = tuple(spec.name for spec in layout.trained) if active else ()
        whole = self.layout.activated(active) if active else self.layout
        longer = math.sqrt(whole.num_trained / layout.num_trained) if prefixes else 1.0
        return UnderWay(server_round, trained, received, frozen, layout, self._frozen[1], arrays, changed,
                        before_sha256, set(), named, prefixes, longer)

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        while len(nodes := list(grid.get_node_ids())) < self.min_nodes:
            time.sleep(1.0)
        return nodes

    @override
    def aggregate_train(self, server_round: int,
                        replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the replies of a round into the next state.

        Each reply is checked as a whole before any of it is added. A reply is not used, and is named in `rejected`, if
        it is an error, if it answers another order, if its tensors are missing, misshaped or not finite, or if
        screening leaves it out.

        Args:
            server_round: The round's number.
            replies: The replies. An iterable that can be read twice is read one reply at a time. The replies of an
                iterator are all kept in memory.

        Returns:
            The next state and figures about the round; (None, None) if no reply could be used.

        Raises:
            Diverged: The next state is not finite or too large, also after a stricter screening.
        """
        under_way = self._end(server_round)
        replies = list(replies) if isinstance(replies, Iterator) else replies
        self.disclosed = {}
        self._closed = Closed(under_way, self.memory, self.usual_norms, self.screen)
        try:
            return self._combine(self._closed, replies)
        except Diverged as no_state:
            return self.aggregate_again(server_round, replies, str(no_state))

    def _end(self, server_round: int) -> UnderWay:
        """Return the round under way, to which no further order belongs."""
        under_way, self._round = self._round, None
        if under_way is None or under_way.number != server_round:
            raise ValueError(f"round {server_round} was not configured; call configure_train before it is aggregated")
        return under_way

    def aggregate_sum(self, server_round: int, total: np.ndarray, grid: integers.Grid,
                      survivors: int) -> tuple[ArrayRecord, MetricRecord]:
        """Make the next state of the sum that a round of secure aggregation has opened.

        The mean g of the clients' steps is total / (survivors · b), where each group of tensors is divided by its
        scale. A client that stepped by itself would move by −lr · g; this change goes through the server step as the
        mean change of uploads does. Nothing is screened: the server sees no upload.

        Args:
            server_round: The round's number, from 1.
            total: [values] int64, the sum of the survivors' vectors in units of the grid. Its values are those of the
                round's trained tensors in order of their names, each in C order, and then the scores of the records
                that the plan holds out.
            grid: The integers of the run.
            survivors: The number of clients whose vectors are in the sum.

        Returns:
            The next state and figures about the round.

        Raises:
            Diverged: The next state is not finite or too large. The memory is that before the round.
        """
        under_way = self._end(server_round)
        self.disclosed, self.rejected, self.curbed = {}, {}, {}
        self._closed = Closed(under_way, self.memory, self.usual_norms, math.inf)  # cannot be screened more strictly
        values = under_way.active.num_trained + self.plan.counted
        if total.shape != (values,):
            raise ValueError(f"the sum of round {server_round} has the shape {total.shape}; it must be ({values},)")
        lr = RoundPlan(self.plan, server_round, 0, under_way.frozen_sha256).lr
        decoded = grid.decode(total)
        summed = split({spec.name: spec.shape for spec in under_way.active.trained}, decoded)
        scales = {"adapter": self.plan.adapter_scale, "head": self.plan.head_scale}
        divisor = survivors * self.plan.expected_batch * (1 - self.plan.hold_out)
        reduced = {spec.name: under_way.sent[spec.name] - lr / (divisor * scales[spec.group]) * summed[spec.name]
                   for spec in under_way.active.trained}
        held_out = dict(zip(HELD_OUT, map(float, decoded[under_way.active.num_trained:]), strict=False))
        return self._next(self._closed, Released(reduced), {}, None,
                          {"replies": survivors, "steps": survivors, **held_out})

    def aggregate_again(self, server_round: int, replies: Iterable[Message],
                        why: str) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the replies of the last round once more, screened with half the limit.

        Args:
            server_round: The round's number.
            replies: The replies that `aggregate_train` was given.
            why: Why its state is not used.

        Returns:
            The next state and figures about the round; (None, None) if no reply could be used.

        Raises:
            Diverged: Screening is off, or the round was combined again before; or the stricter screening leaves out the
                same uploads as before, or all of them; or the state is unusable again; or it comes from a secure sum,
                in which nothing is screened. The memory is then put back to that before the round.
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
        """Screen and reduce the replies, then take the server step.

        Raises:
            Diverged: The next state has values that are not finite or too large.
        """
        under_way = closed.under_way
        gathering, figures = self._gather(replies, under_way, {}, math.inf)
        others, most = self._screen(figures.measured, closed)
        if others or any((one.examples or 0) > most for one in figures.measured.values()):
            del gathering  # frees its memory for the next one
            gathering, figures = self._gather(replies, under_way, others, most)
        if 0 < figures.replies < (fewest := self.step.reduction.fewest):
            why = (f"its round has {figures.replies} usable uploads, and the run's reduction needs {fewest}, so the "
                   "round changes nothing")
            self.rejected |= dict.fromkeys(figures.measured, why)
            return None, None
        if not figures.replies:
            return None, None
        reduced, trained = gathering.result(), {spec.name for spec in under_way.active.trained}
        refreshed = {name: array for name, array in reduced.items() if name not in trained}
        usual = usual_norm([one.comparable for one in figures.measured.values()])
        return self._next(closed, Released({name: reduced[name] for name in reduced if name in trained}), refreshed,
                          None if usual is None else usual * under_way.longer, figures.to_dict())

    def _next(self, closed: Closed, reduced: Released, refreshed: Tensors, usual: float | None,
              figures: Mapping[str, int | float]) -> tuple[ArrayRecord, MetricRecord]:
        """Take the server step with a round's reduced uploads.

        Args:
            closed: The round.
            reduced: The tensors that trained, reduced.
            refreshed: New values of frozen tensors, from a reduction that has them.
            usual: The usual norm of the uploads, as of the whole rank; None if it is not known.
            figures: Figures about the uploads.

        Returns:
            The next state and figures about the round.

        Raises:
            Diverged: The next state has values that are not finite or too large.
        """
        under_way, number = closed.under_way, closed.under_way.number
        before = {**under_way.trained, **under_way.frozen}
        moved, memory = self.step.combine(reduced, under_way.sent, before, closed.memory, number)
        try:
            under_way.active.check(moved, "trained", MOST_VALUE)
            moved = pasted(moved, before)
            idle = {name: array for name, array in under_way.sent.items() if name not in moved}
            state, memory = self.step.rewrite({**before, **pasted(idle, before), **refreshed, **moved}, memory, number)
            self.layout.check(state, "state", MOST_RECEIVED if self.plan.private else MOST_VALUE)  # as clients do
        except ValueError as error:
            raise Diverged(str(error)) from None
        self.memory = memory
        self.usual_norms = closed.usual_norms if usual is None else (*closed.usual_norms, usual)
        metrics = {**figures, "rejected": len(self.rejected),
                   "update_norm": distance(moved, under_way.trained)}
        metrics |= {} if usual is None else {"usual_norm": usual}
        return to_record({spec.name: state[spec.name] for spec in self.layout.state}), MetricRecord({**metrics})

    def _gather(self, replies: Iterable[Message], under_way: UnderWay, others: Mapping[int, str],
                most_examples: float) -> tuple[Gathering, Figures]:
        """Reduce the uploads.

        Args:
            replies: The replies.
            under_way: The round.
            others: Node id → why its upload is left out.
            most_examples: The most examples that an upload may count for.
        """
        self.rejected, self.curbed = dict(others), {}
        start = {} if self.sends_changes else under_way.sent
        held = under_way.frozen if isinstance(self.step.reduction, FactorReduction) else {}
        gathering, figures = self.step.reduction.begin({**held, **start}), Figures()
        for node, upload in self._in_order(replies, under_way):
            examples = upload.num_examples if self.plan.weight_by_examples else None
            if examples is not None and examples > most_examples:
                self.curbed[node] = (f"it counts for {most_examples:.0f} examples, {EXAMPLES:g} times the lower median "
                                     f"of the round's uploads, in place of {examples}")
            gathering.add(upload.tensors, 1.0 if examples is None else min(float(examples), most_examples))
            share = under_way.share_of(node)
            norm = distance(upload.tensors, {} if self.sends_changes else share.sent)
            figures.add(upload, node, Measured(norm, upload.noise_multiplier, examples,
                                               share.longer / under_way.longer))
        return gathering, figures

    def _screen(self, measured: Mapping[int, Measured], closed: Closed) -> tuple[dict[int, str], float]:
        """Return node id → why its upload is left out, and the most examples that an upload may count for."""
        if math.isinf(self.screen):
            return {}, math.inf
        reach, stricter = self._reach(closed.under_way), closed.k != self.screen
        self.uncompared = not reach.bounded and len(measured) < COMPARED and not closed.usual_norms
        earlier = [norm / closed.under_way.longer for norm in closed.usual_norms]
        return left_out(measured, closed.k, earlier, reach, among_few=stricter), most_examples(measured)

    def _reach(self, under_way: UnderWay) -> Reach:
        """Return how far the training of this round can move the tensors."""
        lr = RoundPlan(self.trained_by, under_way.number, 0, under_way.frozen_sha256).lr
        return reach_of(self.trained_by, under_way.active, lr, distance(under_way.sent, {}))

    def _in_order(self, replies: Iterable[Message], under_way: UnderWay) -> Iterator[tuple[int, Upload]]:
        """Yield (node id, upload) of the valid uploads, by ascending node id.

        An upload is held back while a node with a lower id may still reply. Replies of nodes that are in `rejected`
        already are not read.
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
            raise ValueError("the upload discloses a number of examples or a loss, which a private run forbids")
        if self.plan.weight_by_examples and (answer.num_examples is None or answer.num_examples < 1):
            raise ValueError(f"the upload's number of examples is {answer.num_examples}; weighting by examples "
                             "needs at least 1")
        under_way.share_of(node).active.check(answer.tensors, "trained")
        self._held[node] = under_way.frozen_sha256
        self.disclosed[node] = upload_metrics(answer)
        return answer

    @override
    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord,
                           grid: Grid) -> Iterable[Message]:
        """Return no orders: clients are never asked for figures about their private data. Evaluate at the server."""
        return ()

    @override
    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return None, because no client was asked to evaluate."""
        return None

    @override
    def summary(self) -> None:
        """Log the run's main values."""
        plan, traffic = self.plan, self.traffic
        log.info("%s: rank %d, %d steps of %s with rate %g per round, %s; per client and round %d values up, %d down",
                 plan.strategy, plan.rank, plan.local_steps, plan.optimizer, plan.lr,
                 "private" if plan.private else "not private", traffic.up, traffic.down)


def _some(names: Iterable[str]) -> str:
    """Return at most three of the names, and how many more there are."""
    known = sorted(names)
    return (", ".join(known[:3]) or "none") + (f" and {len(known) - 3} more" if len(known) > 3 else "")
