"""The round loop, the same for simulation and deployment, over any `Engine`.

    for each round
        draw a cohort from the idle clients that may be asked
        send the orders and wait; meanwhile
            count clients whose time is up as lost
            if too few clients can still answer, ask idle ones as backups, in the next attempt
            once the first clients' time is up, or no backup is left, close with half of the remaining clients' uploads;
            if there are fewer, say so and wait for clients
        take the uploads in order of node id, screen them, reduce them, and take the server's step
        evaluate the state; if it is unusable, screen the same uploads again, twice as strictly, and reduce them again
        write a line of metrics.jsonl and the checkpoint

No client is asked twice for the same (run, round, attempt). Uploads stay valid while the round waits for more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, cast

from flwr.app import ArrayRecord

from fedlora.plan import Released, RunPlan, Tensors
from fedlora_strategies import Diverged, FederatedLoRA
from fedlora_strategies.base import HELD_OUT
from fedlora_strategies.messages import to_record, to_tensors
from fedlora_strategies.private_start import PrivateStart

from . import checkpoint, sum_files
from .checkpoint import Asked, Unfinished
from .client_sampling import RETURN_S, Clients, Ended
from .engine import Engine
from .held_out import held_out_figures
from .observer import Observer, RoundRecord
from .plain_sum import PlainSum
from .round_state import OpenRound, RoundOptions
from .sum_roster import Rosters
from .sum_round import SumRound

MOST_LOSS = 10.0
"""Ratio of a state's loss to the loss of the start, above which the state is unusable."""

_NOTHING: Mapping[str, Any] = {}
"""The empty mapping that records share: a run keeps a record of each of its rounds. Nobody changes it."""

Evaluate = Callable[[Tensors], Mapping[str, float]]


@dataclass(frozen=True)
class FederationResult:
    """The outcome of a run.

    Attributes:
        state: the state after the last finished round.
        records: one for each finished round, and one for round 0 if the start was evaluated.
        ended: "finished", "stopped", "wait-timeout", or "diverged": the next state was unusable, even without the
            longest uploads.
        resumed: the rounds after which the run was resumed.
        why: more about "diverged" and "wait-timeout", for the coordinator to read; may be "".
    """

    state: Tensors
    records: tuple[RoundRecord, ...]
    ended: str
    resumed: tuple[int, ...] = ()
    why: str = ""

    @property
    def rounds(self) -> int:
        """Number of the last finished round."""
        return self.records[-1].round if self.records else 0


@dataclass(frozen=True)
class Run:
    """All that a run needs in addition to an engine.

    Attributes:
        strategy: makes messages and combines uploads.
        state: every tensor that is not in the base checkpoint, as the run starts.
        options: how rounds are run.
        start: a private start: a round 0 whose outcome replaces `state`; None if there is no such round.
        evaluate: returns the figures of a state on the server's own data.
        out: folder for `checkpoint.safetensors` and `metrics.jsonl`; None writes nothing.
        left: how an earlier server left this run, to go on from there.
        left_sum: how it left the run's secure sums.
    """

    strategy: FederatedLoRA
    state: Tensors
    options: RoundOptions
    start: PrivateStart | None = None
    evaluate: Evaluate | None = None
    out: Path | None = None
    left: Unfinished | None = None
    left_sum: sum_files.Left | None = None

    @property
    def plan(self) -> RunPlan:
        """The run's plan."""
        return self.strategy.plan


def run_federation(engine: Engine, run: Run, *, observer: Observer | None = None,
                   stop: Event | None = None) -> FederationResult:
    """Run all rounds of a run's plan.

    Args:
        engine: reaches the clients.
        run: what to run.
        observer: told what happens.
        stop: when it is set, the open round is abandoned, and the state after the last finished round is returned.

    Raises:
        ValueError: the run cannot be resumed as it was left, or its folder was removed.
        OSError: its folder cannot be written to.
    """
    return _UnderWay(engine, run, observer or Observer(), stop or Event()).to_the_end()


class _UnderWay:
    """A run in progress: its state, its records and its clients."""

    def __init__(self, engine: Engine, run: Run, observer: Observer, stop: Event) -> None:
        self._engine, self._run, self._observer, self._stop = engine, run, observer, stop
        left = run.left
        self._records: list[RoundRecord] = list(left.records) if left else []
        self._clients = Clients(engine, run.plan, run.options.seed, left=left.asked if left else None,
                                keep=self._remember)
        self._said: dict[str, Mapping[str, int | float]] = {}
        self._rosters = Rosters(engine, self._clients, run.plan, run.strategy.summed, run.options, observer,
                                stop, self._keep, run.left_sum, renewed=run.strategy.forget)
        self._state, self._done, self._fresh, self._uncompared = run.state, 0, True, False
        if left is not None and left.state is not None:
            self._state, self._done, self._fresh = left.state, left.round, False
            if left.round:
                run.strategy.take_up(left.memory, left.state)
                run.strategy.usual_norms = tuple(record.usual_norm for record in self._records
                                                 if record.round and record.usual_norm is not None)

    def to_the_end(self) -> FederationResult:
        """Run the remaining rounds."""
        run, ended, why = self._run, "finished", ""
        self._observer.begin(run.plan, tuple(self._records))
        initial = self._figures(0, self._state) if self._fresh else {}
        if initial:
            self._observer.evaluated(0, initial)
        if self._fresh and run.start is None:
            if initial:
                self._conclude(RoundRecord(0, evaluation=initial))
            else:
                self._save(0)
        try:
            if self._done == run.plan.rounds:  # clients of an earlier server return to be told that it is over
                asked = len(self._clients.participations.keys() - self._clients.declined)
                self._clients.wait_for(asked, RETURN_S, self._stop, self._observer, to_begin=True)
            else:
                begun = self._done or self._clients.participations or self._rosters.roster  # there were enough to begin
                self._clients.wait_for(run.options.min_clients, RETURN_S if begun else None, self._stop,
                                       self._observer, to_begin=True)
            if self._fresh and run.start is not None:
                self._begin(run.start, initial)
            arrays = to_record(self._state)
            for number in range(self._done + 1, run.plan.rounds + 1):
                hold = self._hold_sum if run.plan.secure_aggregation else self._hold
                after, record = hold(number, run.strategy, arrays)
                if after is not None:
                    arrays, self._state = after, to_tensors(after)
                self._conclude(record)
        except Ended as early:
            ended, why = early.reason, early.why
        except Diverged as error:
            ended, why = "diverged", self._remedy(error)
        self._observer.ended(ended)
        return FederationResult(self._state, tuple(self._records), ended, run.left.resumptions if run.left else (), why)

    def _begin(self, start: PrivateStart, evaluation: Mapping[str, float]) -> None:
        """Run round 0, a private start. The model computes the same after it, so `evaluation` holds for it too."""
        self._engine.expect(start.layout)
        sketches, record = self._hold(0, start, to_record(start.tensors))
        if sketches is not None:
            self._state = start.begin(Released(to_tensors(sketches)))
        self._engine.expect(self._run.strategy.layout)
        self._clients.participations.clear()  # the start's release does not count as a round
        self._conclude(replace(record, update_norm=None, evaluation=evaluation))

    def _hold(self, number: int, by: FederatedLoRA, arrays: ArrayRecord) -> tuple[ArrayRecord | None, RoundRecord]:
        """Run one round, and return the next state (None if it did not change) and the round's record.

        Args:
            number: the round's number.
            by: the strategy, or the private start in round 0.
            arrays: the state before the round.

        Raises:
            Diverged: the next state is unusable, even without the longest uploads.
        """
        engine = self._engine
        began, up, down = time.monotonic(), engine.bytes_up, engine.bytes_down
        under_way = OpenRound(engine, by, self._clients, number, self._run.options, self._observer, self._stop)
        replies = under_way.collect(arrays)
        self._observer.combining(number, len(under_way.uploaded))
        try:
            after, metrics = by.aggregate_train(number, replies)
            figures = self._evaluated(number, after) if number else {}
            while why := self._is_no_good(figures):
                self._observer.doubted(number, why)
                after, metrics = by.aggregate_again(number, replies, why)
                figures = self._evaluated(number, after)
        finally:
            replies.discard()
        if figures:
            self._observer.evaluated(number, figures)
        if by.uncompared and not self._uncompared:
            self._uncompared = True
            self._observer.uncompared(number, len(under_way.uploaded))
        averages = cast(dict[str, float], dict(metrics or {}))
        return after, RoundRecord(
            number, cohort=under_way.cohort, attempts=under_way.attempts, uploaded=under_way.uploaded,
            lost=under_way.lost, refused=under_way.refused or _NOTHING,
            rejected={engine.name_of(node): reason for node, reason in by.rejected.items()} or _NOTHING,
            curbed={engine.name_of(node): how for node, how in by.curbed.items()} or _NOTHING,
            disclosed={name: self._shared(name, said) for name, said in (
                (engine.name_of(node), said) for node, said in by.disclosed.items())} or _NOTHING,
            usual_norm=averages.get("usual_norm"), evaluation=figures or _NOTHING,
            update_norm=averages.get("update_norm"), train_loss=averages.get("train_loss"),
            bytes_up=engine.bytes_up - up, bytes_down=engine.bytes_down - down, seconds=time.monotonic() - began)

    def _hold_sum(self, number: int, by: FederatedLoRA, arrays: ArrayRecord) -> tuple[ArrayRecord, RoundRecord]:
        """Run one round of which the server learns only the sum, and return the next state and the round's record.

        Raises:
            Diverged: the next state is unusable. No upload can be left out: none is known.
        """
        engine = self._engine
        began, up, down = time.monotonic(), engine.bytes_up, engine.bytes_down
        how = number, self._run.options, self._observer, self._stop
        under_way = (SumRound(engine, by, self._clients, self._rosters, *how) if engine.masks else
                     PlainSum(engine, by, self._clients, *how))
        opened = under_way.collect(arrays)
        self._observer.combining(number, len(opened.survivors))
        after, metrics = by.aggregate_sum(number, opened.total, opened.roster.grid, len(opened.survivors))
        figures = self._evaluated(number, after)
        if self._run.plan.counted:
            total, drawn = (cast(float, metrics[name]) for name in HELD_OUT)
            figures = {**figures, **held_out_figures(self._run.plan, (total, drawn), self._records, opened.roster,
                                                     len(opened.survivors))}
        if why := self._is_no_good(figures):
            by.aggregate_again(number, (), why)  # raises Diverged, and puts the memory back
        if figures:
            self._observer.evaluated(number, figures)
        return after, RoundRecord(
            number, cohort=under_way.cohort, attempts=under_way.attempts, uploaded=opened.survivors,
            lost=under_way.lost, refused=under_way.refused or _NOTHING,
            disclosed={name: self._shared(name, under_way.disclosed[name]) for name in opened.survivors
                       if name in under_way.disclosed} or _NOTHING,
            evaluation=figures or _NOTHING, update_norm=cast(float | None, metrics.get("update_norm")),
            bytes_up=engine.bytes_up - up, bytes_down=engine.bytes_down - down, seconds=time.monotonic() - began,
            phases=under_way.seconds, unopened=under_way.unopened, roster=opened.roster.digest.hex())

    def _shared(self, name: str, said: Mapping[str, int | float]) -> Mapping[str, int | float]:
        """Return what the client disclosed the last time if this is the same, as in a private run it always is.

        A run keeps a record of each of its rounds; so those of a long run hold one copy for each client.
        """
        before = self._said.get(name)
        if before != said:
            before = self._said[name] = said
        return before

    def _evaluated(self, number: int, after: ArrayRecord | None) -> Mapping[str, float]:
        """Return the figures of the state after a round. `after` is None if the state did not change."""
        return self._figures(number, self._state if after is None else to_tensors(after))

    def _figures(self, number: int, state: Tensors) -> Mapping[str, float]:
        """Return the figures of the state after a round, or none if that round is not evaluated."""
        run = self._run
        if run.evaluate is None or (number % run.options.evaluate_every and number != run.plan.rounds):
            return {}
        return run.evaluate(state)

    def _is_no_good(self, figures: Mapping[str, float]) -> str:
        """Return why a state with these figures is unusable; "" if it is not."""
        start = self._records[0].evaluation if self._records and not self._records[0].round else {}
        if wrong := [name for name, value in figures.items()
                     if not math.isfinite(value) and math.isfinite(start.get(name, 0.0))]:
            return f"its {wrong[0]} is not finite"
        first, loss = start.get("loss", 0.0), figures.get("loss", 0.0)
        if 0 < MOST_LOSS * first < loss:
            return f"its loss, {loss:.4g}, is more than {MOST_LOSS:g} times that of the start, {first:.4g}"
        return ""

    def _remedy(self, error: Diverged) -> str:
        optimizer = cast(Mapping[str, object] | None, self._run.strategy.described.get("optimizer"))
        rates = [] if self._run.plan.secure_aggregation and optimizer else [f"--lr (now {self._run.plan.lr:g})"]
        rates += [f"--server-lr (now {optimizer['lr']:g})"] if optimizer and "lr" in optimizer else []
        done, seen = (max((record.round for record in records), default=0) for records in (
            self._records, [record for record in self._records if record.evaluation]))
        kept = f"; the state after round {done} is kept (last evaluated: round {seen})" if 0 < seen < done else ""
        without = "" if self._run.plan.secure_aggregation else ", even without the longest uploads"
        return (f"the training diverged: the next state is unusable{without}: {error}. The round's "
                f"result is dropped{kept}. Begin a new run with a lower {' or '.join(rates)}")

    def _conclude(self, record: RoundRecord) -> None:
        self._records.append(record)
        self._keep(lambda out: checkpoint.note(out, record))
        self._save(record.round)
        if record.roster:
            self._keep(sum_files.clear)
        self._observer.finished(record)

    def _save(self, number: int) -> None:
        run = self._run
        self._keep(lambda out: checkpoint.save(out, run.plan.run_id, number, self._state, run.strategy.memory))

    def _remember(self, asked: Asked) -> None:
        self._keep(lambda out: checkpoint.remember(out, asked))

    def _keep(self, write: Callable[[Path], None]) -> None:
        out = self._run.out
        if out is not None:
            checkpoint.patiently(lambda: write(out), out, self._stop, self._observer.held_up)
