"""Continuation of an interrupted run: its state, and its clients' charges as they were after its last finished round.

Simulated clients keep nothing but their charges from round to round: their random numbers follow from the seed, the
client, the round and the attempt, and their optimizers start afresh in each round. So the continued run has the bits of
one that was not interrupted, if it is computed in the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora_client.session import ClientSession
from fedlora_server import checkpoint
from fedlora_server.checkpoint import Unfinished
from fedlora_server.observer import RoundRecord
from fedlora_server.run_setup import Federation

LEDGER = "ledger.sqlite"
"""Name of the clients' simulated ledger in a run's folder. Further files of the ledger begin with this name."""


def why_not(folder: Path, computed_then: Mapping[str, Any], computed_now: Mapping[str, Any]) -> str:
    """Return why an interrupted run cannot be continued with the same bits; "" if it can.

    Args:
        folder: the run's folder.
        computed_then: how it was computed (`cells.HOW`).
        computed_now: how it would be computed now.
    """
    if changed := [f"{name} {then} and now {computed_now.get(name)}" for name, then in computed_then.items()
                   if then != computed_now.get(name)]:
        return f"it was computed with {', '.join(changed)}"
    try:
        left = checkpoint.take_up(folder)
    except ValueError:
        return "its files are not all there"
    if left.state is None or not left.round:
        return "it had not finished a round"
    if any(record.attempts > 1 or record.lost or record.refused for record in left.records):
        return "clients were asked more than once in a round"
    return ""


def taken_up(folder: Path, federation: Federation) -> Unfinished:
    """Return the interrupted run, after checking that it has the plan of `federation`. Its old ledger is removed.

    Raises:
        ValueError: the plan is another one, or the run's files are damaged.
    """
    left = checkpoint.take_up(folder)
    left.check(federation.plan, federation.strategy.described)
    for path in folder.glob(f"{LEDGER}*"):  # it also holds charges of the round that was not finished
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return left


def charge_again(sessions: Mapping[str, ClientSession], records: Iterable[RoundRecord]) -> None:
    """Charge each client's new ledger for the trainings of the finished rounds.

    Args:
        sessions: client name → session, with a new ledger.
        records: the records of the finished rounds, in each of which clients were asked once.
    """
    for record in records:
        for name in record.uploaded:
            session = sessions[name]
            session.ledger.reserve(session.dataset, session.run.run_id, record.round, 0).begin()
