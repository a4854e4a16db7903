"""What a run reports while it lasts: events of its rounds (`Observer`), news of clients, records of finished rounds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedlora.plan import RunPlan


@dataclass(frozen=True)
class ClientEvent:
    """News of a client.

    A client that has not joined is called what it calls itself, made printable.

    Attributes:
        kind: "joined", "rejoined" (it was there before), "ready", "uploaded" (its upload is whole and answers an
            order), "refused" (it declined an order, or its upload was refused), "late" (nobody waits for its answer to
            an order any more; it can come repeatedly), "declined" (it takes no part in the run), "left" (it said so),
            "lost" (its stream broke), "turned-away" (it may not join) or "disconnected" (its certificate is no longer
            taken).
        name: the client's name; "" if it has not said one.
        detail: more about it, for the coordinator to read.
        code: the refusal's code (`fedlora.plan.Refusal`), or "certificate" or "places" for one that may not join.
        peer: address of the client's end of the connection; "" if it has no connection of its own.
        fingerprint: SHA-256 of its certificate's public key, in hexadecimal digits; "" without TLS.
        round: the round of the order that an answer belongs to.
        attempt: the order's attempt.
        sha256: digest of an upload's tensors (`fedlora.wire.tensors_digest`), the same as in the client's own report.
        upload_bytes: size of an upload's tensors on the wire.
    """

    kind: str
    name: str
    detail: str = ""
    code: str = ""
    peer: str = ""
    fingerprint: str = ""
    round: int | None = None
    attempt: int | None = None
    sha256: str = ""
    upload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """The record of one finished round.

    Round 0 comes before training: an evaluation, and a private start if there is one.

    Attributes:
        round: the round's number.
        cohort: names of the clients asked, backup clients last.
        attempts: how many times clients were asked.
        uploaded: names of the clients whose uploads arrived in time.
        lost: names of the clients that left or did not answer in time.
        refused: name → refusal code.
        rejected: name → why the client's upload was left out.
        curbed: name → how many examples the client's upload counts for, if it claimed far more.
        disclosed: name → the numbers that came with the upload's tensors.
        usual_norm: lower median of the L2 norms of the uploads that were taken; later rounds may compare theirs to it.
        update_norm: L2 norm of the change of all trained tensors.
        train_loss: mean training loss; only without privacy.
        bytes_up: bytes received from all clients during the round.
        bytes_down: bytes sent to all clients during the round.
        seconds: the round's duration.
        evaluation: figures on the server's own data, if it has any.
        phases: phase of a secure sum (`fedlora_server.sum_round.PHASES`) → seconds; empty without secure aggregation.
        unopened: how many attempts at a secure sum ended unopened.
        roster: digest of the roster that opened the sum, in hexadecimal digits; "" without secure aggregation.
    """

    round: int
    cohort: tuple[str, ...] = ()
    attempts: int = 0
    uploaded: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    curbed: Mapping[str, str] = field(default_factory=dict)
    disclosed: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    usual_norm: float | None = None
    update_norm: float | None = None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    unopened: int = 0
    roster: str = ""


def jsonable(value: object) -> object:
    """Return the value in a form that JSON can hold.

    Numpy numbers become Python numbers, tuples lists, and paths text. NaN and infinities, as of a diverged loss, become
    text too.
    """
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


MOST_NAMED = 8
"""Largest number of clients that a line names one by one."""


def named(clients: Collection[str]) -> str:
    """Return clients for a line: their names, or their number if there are more than `MOST_NAMED`."""
    return ", ".join(clients) if len(clients) <= MOST_NAMED else f"{len(clients)} clients"


class Observer:
    """A listener to the round loop, which calls a method for each event. Override the methods of interest.

    Each method does nothing by default. All are called from the loop's own thread. `round` is always the round's
    number.
    """

    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        """Hear that the rounds begin.

        Args:
            plan: the run's plan.
            before: records of the rounds that an earlier server finished; empty in a new run.
        """

    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        """Hear that the loop waits for clients.

        Args:
            needed: how many clients it needs.
            present: how many there are.
            timeout_s: seconds that it waits; None for no limit.
        """

    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        """Hear that clients were asked. Attempt 0 asks the round's cohort, later attempts ask backup clients.

        With secure aggregation a later attempt asks a whole new cohort.
        """

    def fewer(self, round: int, connected: int, needed: int) -> None:
        """Hear that only `connected` clients are left of the `needed` that the run began with. It goes on with them."""

    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        """Hear that these clients did not answer in time, and that the round needs `missing` more uploads."""

    def doubted(self, round: int, why: str) -> None:
        """Hear that the round's result is unusable (`why`), and is computed again with a screen twice as strict."""

    def uncompared(self, round: int, uploads: int) -> None:
        """Hear that a round had too few uploads to recognise unusually long ones, and no earlier round to compare with.

        Called at most once in a run.
        """

    def held_up(self, reason: str) -> None:
        """Hear that the run waits because this machine cannot store files for now."""

    def rostered(self, round: int, names: tuple[str, ...], threshold: int, digest: str) -> None:
        """Hear that a new roster was made for secure sums; `threshold` of its members open one."""

    def left_out(self, name: str, why: str) -> None:
        """Hear that a client that is ready can be in no roster."""

    def summing(self, round: int, phase: str) -> None:
        """Hear that a phase of a secure sum begins (`fedlora_server.sum_round.PHASES`)."""

    def unopened(self, round: int, attempt: int, why: str) -> None:
        """Hear that an attempt at a secure sum ended unopened."""

    def answered(self, round: int, name: str, outcome: str) -> None:
        """Hear what became of a client's order: "uploaded", "lost" or a refusal's text."""

    def combining(self, round: int, uploads: int) -> None:
        """Hear that the round takes no more uploads, and that those there are will be combined and evaluated."""

    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        """Hear the figures of the state after the round, on the server's data. Round 0 is the start."""

    def finished(self, record: RoundRecord) -> None:
        """Hear that the round is closed and its checkpoint is written."""

    def ended(self, reason: str) -> None:
        """Hear that there is no further round: "finished", "stopped", "wait-timeout" or "diverged"."""


class Watcher(Observer):
    """An observer of a whole run: it hears of the run's beginning and end and of its clients, too."""

    def open(self) -> None:
        """Begin, before any client has joined."""

    def said(self, line: str) -> None:
        """Take a line for the coordinator that is no event of the round loop. Called from any thread."""

    def client(self, event: ClientEvent) -> None:
        """Hear news of a client.

        Called from any thread, under the lock of the registry, so it must return quickly. A client decides how often it
        joins: who writes lines about clients limits them (`fedlora_server.peer_lines`).
        """

    def close(self) -> None:
        """End, after all else, however the run ended."""
