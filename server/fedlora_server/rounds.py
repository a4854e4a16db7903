"""The round loop: one for simulation and deployment, over any `Engine`.

    for each round
        draw the cohort from the eligible clients that are idle
        send the orders and wait
            too few can still answer, or the time is up: ask idle clients as backups, as the next attempt
            no backup client is left: say so and wait for clients
        take the uploads in order of node id, average them, take the server's step
        write a line of metrics.jsonl and the checkpoint

No client is asked twice for one (run, round, attempt). What was uploaded to a short round stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import cast

from flwr.app import ArrayRecord

from fedlora.plan import Released, RunPlan, Tensors
from fedlora_strategies import FederatedLoRA
from fedlora_strategies.messages import to_record, to_tensors
from fedlora_strategies.private_start import PrivateStart

from . import checkpoint
from .checkpoint import Unfinished
from .engine import Engine
from .observer import Observer, RoundRecord
from .round_state import RETURN_S, Clients, Ended, OpenRound, RoundOptions

Evaluate = Callable[[Tensors], Mapping[str, float]]


@dataclass(frozen=True)
class FederationResult:
    """How a run ended.

    Attributes:
        state: after the last finished round.
        records: one per finished round, and round 0 if the start was evaluated.
        ended: "finished", "stopped", or "wait-timeout".
        resumed: after which rounds another server took the run up.
    """

    state: Tensors
    records: tuple[RoundRecord, ...]
    ended: str
    resumed: tuple[int, ...] = ()

    @property
    def rounds(self) -> int:
        """How many rounds were finished."""
        return self.records[-1].round if self.records else 0


def run_federation(engine: Engine, strategy: FederatedLoRA, plan: RunPlan, state: Tensors, options: RoundOptions, *,
                   observer: Observer | None = None, evaluate: Evaluate | None = None, stop: Event | None = None,
                   out: Path | None = None, start: PrivateStart | None = None,
                   left: Unfinished | None = None) -> FederationResult:
    """Run all rounds of a plan.

    Args:
        state: every tensor that is not in the base checkpoint, as the run starts.
        observer: told what happens.
        evaluate: figures of a state on the server's own data.
        stop: when it is set, the open round is abandoned and the state of the last finished one returned.
        out: folder for `checkpoint.safetensors` and `metrics.jsonl`.
        start: a round 0, whose outcome takes the place of `state`.
        left: how an earlier server left this run; it goes on from there.
    """
    observer, stop = observer or Observer(), stop or Event()
    records: list[RoundRecord] = list(left.records) if left else []
    clients = Clients(engine, plan, options.seed, left=left.asked if left else None,
                      keep=partial(checkpoint.remember, out) if out is not None else lambda asked: None)
    fresh, last = True, 0
    if left is not None and left.state is not None:
        fresh, last, state = False, left.round, left.state

    def conclude(record: RoundRecord, after: Tensors) -> None:
        records.append(record)
        if out is not None:
            checkpoint.note(out, record)
            checkpoint.save(out, plan.run_id, record.round, after)
        observer.finished(record)

    def figures(round: int, of: Tensors) -> Mapping[str, float]:
        if evaluate is None or (round % options.evaluate_every and round != plan.rounds):
            return {}
        result = evaluate(of)
        observer.evaluated(round, result)
        return result

    def hold(number: int, by: FederatedLoRA, arrays: ArrayRecord) -> tuple[ArrayRecord | None, RoundRecord]:
        """One round: the next state, if there is one, and what happened but for the evaluation."""
        began, up, down = time.monotonic(), engine.bytes_up, engine.bytes_down
        under_way = OpenRound(engine, by, clients, number, options, observer, stop)
        averaged, metrics = by.aggregate_train(number, under_way.collect(arrays))
        averages = cast(dict[str, float], dict(metrics or {}))
        return averaged, RoundRecord(
            number, cohort=under_way.cohort, attempts=under_way.attempts, uploaded=under_way.uploaded,
            lost=under_way.lost, refused=under_way.refused,
            rejected={engine.name_of(node): reason for node, reason in by.rejected.items()},
            disclosed={engine.name_of(node): said for node, said in by.disclosed.items()},
            update_norm=averages.get("update_norm"), train_loss=averages.get("train_loss"),
            bytes_up=engine.bytes_up - up, bytes_down=engine.bytes_down - down, seconds=time.monotonic() - began)

    observer.begin(plan, tuple(records))
    initial = figures(0, state) if fresh else {}
    if fresh and start is None:
        if initial:
            conclude(RoundRecord(0, evaluation=initial), state)
        elif out is not None:
            checkpoint.save(out, plan.run_id, 0, state)
    ended = "finished"
    try:
        if last < plan.rounds:
            clients.wait_for(options.min_clients, RETURN_S if last else None, stop, observer, to_begin=True)
        if start is not None and fresh:
            engine.expect(start.layout)
            sketches, record = hold(0, start, to_record(start.tensors))
            state = state if sketches is None else start.begin(Released(to_tensors(sketches)))
            engine.expect(strategy.layout)
            clients.participations.clear()  # the release is beside the rounds
            conclude(replace(record, update_norm=None, evaluation=initial), state)  # it moves the model nowhere
        arrays = to_record(state)
        for number in range(last + 1, plan.rounds + 1):
            averaged, record = hold(number, strategy, arrays)
            if averaged is not None:
                arrays, state = averaged, to_tensors(averaged)
            conclude(replace(record, evaluation=figures(number, state)), state)
    except Ended as early:
        ended = early.reason
    observer.ended(ended)
    return FederationResult(state, tuple(records), ended, left.resumptions if left else ())
