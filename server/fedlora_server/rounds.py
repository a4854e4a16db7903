"""The round loop: one for simulation and deployment, over any `Engine`.

    for each round
        draw the cohort from the eligible clients that are idle
        send the orders and wait
            too few can still answer, or the time is up: draft idle clients as the next attempt
            nobody is left to draft: say so and wait for clients
        take the uploads in order of node id, average them, take the server's step
        write the checkpoint and a line of metrics.jsonl

No client is asked twice for one (run, round, attempt). What was uploaded to a short round stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import cast

from fedlora.plan import RunPlan, Tensors
from fedlora_strategies import FederatedLoRA
from fedlora_strategies.messages import to_record, to_tensors

from . import checkpoint
from .cohort import Clients, Ended, OpenRound
from .engine import Engine

Evaluate = Callable[[Tensors], Mapping[str, float]]


@dataclass(frozen=True)
class RoundOptions:
    """How rounds are run; nothing here is sent to clients.

    Attributes:
        seed: of the cohorts.
        clients_per_round: size of a cohort; None takes every eligible client.
        min_clients: round 1 waits, without limit, until so many are connected.
        min_replies: uploads without which no round closes; None for half of the cohort, rounded up.
        round_timeout_s: after it, a round closes with at least `min_replies`, or drafts.
        wait_timeout_s: how long a round with nobody left to ask waits for clients before the run ends.
        evaluate_every: evaluate after every so many rounds, and after the last.
    """

    seed: int
    clients_per_round: int | None = None
    min_clients: int = 1
    min_replies: int | None = None
    round_timeout_s: float = 3600.0
    wait_timeout_s: float = 3600.0
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        for name in ("clients_per_round", "min_clients", "min_replies", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round. Round 0 is the evaluation before the first.

    Attributes:
        cohort: names asked, the drafted ones last; attempts: how many times somebody was asked.
        uploaded, lost: names. refused: name → refusal code. rejected: name → why its upload added nothing.
        disclosed: name → what its upload said beside the tensors.
        update_norm: L2 norm of the change of all trained tensors; train_loss: mean, only without privacy.
        bytes_up, bytes_down: of all clients, from the start of the round to its end.
        evaluation: on the server's own data, if it has any.
    """

    round: int
    cohort: tuple[str, ...] = ()
    attempts: int = 0
    uploaded: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    disclosed: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    update_norm: float | None = None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    evaluation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FederationResult:
    """How a run ended.

    Attributes:
        state: after the last finished round.
        records: one per finished round, and round 0 if the start was evaluated.
        ended: "finished", "stopped", or "wait-timeout".
    """

    state: Tensors
    records: tuple[RoundRecord, ...]
    ended: str

    @property
    def rounds(self) -> int:
        """How many rounds were finished."""
        return self.records[-1].round if self.records else 0


class Observer:
    """What the round loop tells while it runs; override what is of interest. Called from the loop's own thread."""

    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        """Nobody can be asked: `present` clients could take part and `needed` are. None: it waits without limit."""

    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        """Orders were sent; attempt 0 is the round's cohort, later ones are drafts."""

    def answered(self, round: int, name: str, outcome: str) -> None:
        """A client's state changed: "uploaded", "lost" or a refusal's text."""

    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        """The server evaluated the state after the round; 0 is the start."""

    def finished(self, record: RoundRecord) -> None:
        """The round is closed and its checkpoint is written."""


def run_federation(engine: Engine, strategy: FederatedLoRA, plan: RunPlan, state: Tensors, options: RoundOptions, *,
                   observer: Observer | None = None, evaluate: Evaluate | None = None, stop: Event | None = None,
                   out: Path | None = None) -> FederationResult:
    """Run all rounds of a plan.

    Args:
        state: every tensor that is not in the base checkpoint, as the run starts.
        observer: told what happens.
        evaluate: figures of a state on the server's own data.
        stop: when it is set, the open round is abandoned and the state of the last finished one returned.
        out: folder for `checkpoint.safetensors` and `metrics.jsonl`.
    """
    observer, stop = observer or Observer(), stop or Event()
    clients = Clients(engine, plan, options.seed)
    records: list[RoundRecord] = []

    def conclude(record: RoundRecord, after: Tensors) -> None:
        records.append(record)
        if out is not None:
            checkpoint.save(out, plan.run_id, record.round, after)
            with (out / "metrics.jsonl").open("a") as lines:
                lines.write(json.dumps(asdict(record)) + "\n")
        observer.finished(record)

    def figures(round: int, of: Tensors) -> Mapping[str, float]:
        if evaluate is None or (round % options.evaluate_every and round != plan.rounds):
            return {}
        result = evaluate(of)
        observer.evaluated(round, result)
        return result

    if initial := figures(0, state):
        conclude(RoundRecord(0, evaluation=initial), state)
    arrays, ended = to_record(state), "finished"
    try:
        clients.wait_for(options.min_clients, None, stop, observer)
        for number in range(1, plan.rounds + 1):
            began, up, down = time.monotonic(), engine.bytes_up, engine.bytes_down
            under_way = OpenRound(engine, strategy, clients, number, options, observer, stop)
            uploads = under_way.collect(arrays)
            averaged, metrics = strategy.aggregate_train(number, uploads)
            if averaged is not None:
                arrays, state = averaged, to_tensors(averaged)
            averages = cast(dict[str, float], dict(metrics or {}))
            record = RoundRecord(
                number, cohort=under_way.cohort, attempts=under_way.attempts, uploaded=under_way.uploaded,
                lost=under_way.lost, refused=under_way.refused,
                rejected={engine.name_of(node): reason for node, reason in strategy.rejected.items()},
                disclosed={engine.name_of(node): said for node, said in strategy.disclosed.items()},
                update_norm=averages.get("update_norm"), train_loss=averages.get("train_loss"),
                bytes_up=engine.bytes_up - up, bytes_down=engine.bytes_down - down,
                seconds=time.monotonic() - began, evaluation=figures(number, state))
            conclude(record, state)
    except Ended as early:
        ended = early.reason
    return FederationResult(state, tuple(records), ended)
