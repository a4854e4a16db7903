"""What a run tells while it lasts, and what it says of each finished round."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedlora.plan import RunPlan


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round. Round 0 is before the first: an evaluation, or a private start too.

    Attributes:
        cohort: names asked, backup clients last; attempts: how many times somebody was asked.
        uploaded, lost: names. refused: name → refusal code. rejected: name → why its upload added nothing.
        curbed: name → for how few examples its upload counts.
        disclosed: name → what its upload said beside the tensors.
        update_norm: L2 norm of the change of all trained tensors; usual_norm: lower median of those of the uploads that
            were taken, with which later rounds may compare theirs; train_loss: mean, only without privacy.
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
    curbed: Mapping[str, str] = field(default_factory=dict)
    disclosed: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    usual_norm: float | None = None
    update_norm: float | None = None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    evaluation: Mapping[str, float] = field(default_factory=dict)


def jsonable(value: object) -> object:
    """The value with numpy's numbers as Python's; paths, and numbers that JSON does not know (a diverged loss), as
    text.
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


def named(clients: Collection[str]) -> str:
    """Clients for a line: their names, or how many they are where they are many."""
    return ", ".join(clients) if len(clients) <= MOST_NAMED else f"{len(clients)} clients"


class Observer:
    """What the round loop tells while it runs; override what is of interest. Called from the loop's own thread."""

    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        """The rounds begin, after those that an earlier server finished."""

    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        """Nobody can be asked: `present` clients could take part and `needed` are. None: it waits without limit."""

    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        """Orders were sent; attempt 0 is the round's cohort, later ones are of backup clients."""

    def fewer(self, round: int, connected: int, needed: int) -> None:
        """Only `connected` clients are there, fewer than the `needed` that the run waited for; it goes on with them."""

    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        """These clients' time is up and they are lost to the round, which needs `missing` more uploads."""

    def doubted(self, round: int, why: str) -> None:
        """The round's next state is no good: its uploads are screened by half the measure and combined once more."""

    def uncompared(self, round: int, uploads: int) -> None:
        """The round's uploads were too few to compare their lengths, and no earlier round can help. Told once."""

    def held_up(self, reason: str) -> None:
        """The run cannot write to its folder, or store uploads, and waits until it can; the reason is this machine's.
        """

    def answered(self, round: int, name: str, outcome: str) -> None:
        """A client's state changed: "uploaded", "lost" or a refusal's text."""

    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        """The server evaluated the state after the round; 0 is the start."""

    def finished(self, record: RoundRecord) -> None:
        """The round is closed and its checkpoint is written."""

    def ended(self, reason: str) -> None:
        """There is no further round: "finished", "stopped", "wait-timeout" or "diverged"."""
