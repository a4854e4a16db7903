"""The round loop: one for simulation and deployment, over any `Engine`.

    for each round
        draw the cohort from the eligible clients that are idle
        send the orders and wait
            whose time is up is lost; too few can still answer: ask idle clients as backups, as the next attempt
            the first ones' time is up, or no backup client is left: close with half of those that are left, or say so
            and wait for clients
        take the uploads in order of node id, screen and reduce them, take the server's step
        evaluate the state; if it is no good, screen and reduce the same uploads once more, by half the measure
        write a line of metrics.jsonl and the checkpoint

No client is asked twice for one (run, round, attempt). What was uploaded to a short round stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import cast

from flwr.app import ArrayRecord

from fedlora.plan import Released, RunPlan, Tensors
from fedlora_strategies import Diverged, FederatedLoRA
from fedlora_strategies.messages import to_record, to_tensors
from fedlora_strategies.private_start import PrivateStart

from . import checkpoint
from .checkpoint import Asked, Unfinished
from .client_sampling import RETURN_S, Clients, Ended
from .engine import Engine
from .observer import Observer, RoundRecord
from .round_state import OpenRound, RoundOptions

MOST_LOSS = 10.0
"""A state whose loss is more than so many times that of the start is not taken."""

Evaluate = Callable[[Tensors], Mapping[str, float]]


@dataclass(frozen=True)
class FederationResult:
    """How a run ended.

    Attributes:
        state: after the last finished round.
        records: one per finished round, and round 0 if the start was evaluated.
        ended: "finished", "stopped", "wait-timeout", or "diverged": the next state was no good, whichever uploads made
            it.
        resumed: after which rounds another server took the run up.
        why: of "diverged" and "wait-timeout", for whoever gave the command; may be "".
    """

    state: Tensors
    records: tuple[RoundRecord, ...]
    ended: str
    resumed: tuple[int, ...] = ()
    why: str = ""

    @property
    def rounds(self) -> int:
        """How many rounds were finished."""
        return self.records[-1].round if self.records else 0


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
        state: every tensor that is not in the base checkpoint, as the run starts.
        options: how rounds are run.
        start: a round 0, whose outcome takes the place of `state`.
        evaluate: figures of a state on the server's own data.
        out: folder for `checkpoint.safetensors` and `metrics.jsonl`.
        left: how an earlier server left this run; it goes on from there.
    """

    strategy: FederatedLoRA
    state: Tensors
    options: RoundOptions
    start: PrivateStart | None = None
    evaluate: Evaluate | None = None
    out: Path | None = None
    left: Unfinished | None = None

    @property
    def plan(self) -> RunPlan:
        return self.strategy.plan


def run_federation(engine: Engine, run: Run, *, observer: Observer | None = None,
                   stop: Event | None = None) -> FederationResult:
    """Run all rounds of a plan.

    Args:
        observer: told what happens.
        stop: when it is set, the open round is abandoned and the state of the last finished one returned.

    Raises:
        ValueError: the run cannot be taken up as it was left, or its folder was removed.
        OSError: its folder cannot be written to.
    """
    return _UnderWay(engine, run, observer or Observer(), stop or Event()).to_the_end()


class _UnderWay:
    """A run from its first state to its last, on an engine."""

    def __init__(self, engine: Engine, run: Run, observer: Observer, stop: Event) -> None:
        self._engine, self._run, self._observer, self._stop = engine, run, observer, stop
        left = run.left
        self._records: list[RoundRecord] = list(left.records) if left else []
        self._clients = Clients(engine, run.plan, run.options.seed, left=left.asked if left else None,
                                keep=self._remember)
        self._state, self._done, self._fresh, self._uncompared = run.state, 0, True, False
        if left is not None and left.state is not None:
            self._state, self._done, self._fresh = left.state, left.round, False
            if left.round:
                run.strategy.take_up(left.memory, left.state)
                run.strategy.usual_norms = tuple(record.usual_norm for record in self._records
                                                 if record.round and record.usual_norm is not None)

    def to_the_end(self) -> FederationResult:
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
            if self._done == run.plan.rounds:  # those that an earlier server asked are told that it is over
                asked = len(self._clients.participations.keys() - self._clients.declined)
                self._clients.wait_for(asked, RETURN_S, self._stop, self._observer, to_begin=True)
            else:
                self._clients.wait_for(run.options.min_clients, RETURN_S if self._done else None, self._stop,
                                       self._observer, to_begin=True)
            if self._fresh and run.start is not None:
                self._begin(run.start, initial)
            arrays = to_record(self._state)
            for number in range(self._done + 1, run.plan.rounds + 1):
                after, record = self._hold(number, run.strategy, arrays)
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
        """Round 0. It moves the model nowhere: its evaluation is that of the state before."""
        self._engine.expect(start.layout)
        sketches, record = self._hold(0, start, to_record(start.tensors))
        if sketches is not None:
            self._state = start.begin(Released(to_tensors(sketches)))
        self._engine.expect(self._run.strategy.layout)
        self._clients.participations.clear()  # the release is beside the rounds
        self._conclude(replace(record, update_norm=None, evaluation=evaluation))

    def _hold(self, number: int, by: FederatedLoRA, arrays: ArrayRecord) -> tuple[ArrayRecord | None, RoundRecord]:
        """One round: the next state, if there is one, and what happened.

        Raises:
            Diverged: no next state is any good.
        """
        engine = self._engine
        began, up, down = time.monotonic(), engine.bytes_up, engine.bytes_down
        under_way = OpenRound(engine, by, self._clients, number, self._run.options, self._observer, self._stop)
        replies = under_way.collect(arrays)
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
            lost=under_way.lost, refused=under_way.refused,
            rejected={engine.name_of(node): reason for node, reason in by.rejected.items()},
            curbed={engine.name_of(node): how for node, how in by.curbed.items()},
            disclosed={engine.name_of(node): said for node, said in by.disclosed.items()},
            usual_norm=averages.get("usual_norm"), evaluation=figures,
            update_norm=averages.get("update_norm"), train_loss=averages.get("train_loss"),
            bytes_up=engine.bytes_up - up, bytes_down=engine.bytes_down - down, seconds=time.monotonic() - began)

    def _evaluated(self, number: int, after: ArrayRecord | None) -> Mapping[str, float]:
        """Figures of the state after a round. `after` is None where it is still the one before."""
        return self._figures(number, self._state if after is None else to_tensors(after))

    def _figures(self, number: int, state: Tensors) -> Mapping[str, float]:
        """Of a state after a round, where that is to be evaluated."""
        run = self._run
        if run.evaluate is None or (number % run.options.evaluate_every and number != run.plan.rounds):
            return {}
        return run.evaluate(state)

    def _is_no_good(self, figures: Mapping[str, float]) -> str:
        """What is wrong with a state of these figures; "" for nothing."""
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
        server = f", or --server-lr, which is {optimizer['lr']:g}" if optimizer and "lr" in optimizer else ""
        done, seen = (max((record.round for record in records), default=0) for records in (
            self._records, [record for record in self._records if record.evaluation]))
        kept = f"; what is kept was last evaluated after round {seen} of {done}" if 0 < seen < done else ""
        return (f"the next state is no good, also without the uploads that go furthest: {error}. Nothing of the round "
                f"is taken{kept}. Begin a new run with a lower --lr, which is {self._run.plan.lr:g}{server}")

    def _conclude(self, record: RoundRecord) -> None:
        self._records.append(record)
        self._keep(lambda out: checkpoint.note(out, record))
        self._save(record.round)
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
