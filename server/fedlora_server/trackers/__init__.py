"""Trackers: what watches a run, and shows or keeps what it sees. Each file of this folder is one, found by its name.

A file says `TRACKER = ` a class of `Tracker`. What a run needs to be taken up again, metrics.jsonl among it, is no
tracker's: it is written whatever watches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedlora import registry
from fedlora.plan import RunPlan
from fedlora_server.observer import Observer, RoundRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """A run, as its trackers are told of it before anything happens.

    Attributes:
        title: in a few words.
        out: its folder, which is there.
        console: where its operator is; stderr by convention, so that a command's output can be piped.
        options: of the command, by name, with the preset's values where none were given.
    """

    title: str
    out: Path
    console: Console
    options: Mapping[str, object]


class Tracker(Observer):
    """An observer with a beginning and an end, made for one run. Override what is of interest.

    One that raises is said to have failed, and hears no more; the run goes on.
    """

    def __init__(self, run: Watched) -> None:
        self.run = run

    def open(self) -> None:
        """Before clients come."""

    def said(self, line: str) -> None:
        """Something for the operator that is no event of the round loop. Called from any thread."""

    def close(self) -> None:
        """After all else, whatever way the run ended."""


class Trackers(Tracker):
    """Several at once, as a context manager around the run.

    Args:
        keys: of `fedlora_server.trackers`, in any order.
    """

    def __init__(self, keys: Iterable[str], run: Watched) -> None:
        super().__init__(run)
        self._trackers: dict[str, Tracker] = {}
        for key in sorted(keys):
            try:
                self._trackers[key] = registry.load("fedlora_server.trackers", key).TRACKER(run)
            except Exception as error:
                log.error("The tracker %s cannot be made and is left out: %s: %s", key, type(error).__name__, error)

    def __enter__(self) -> Trackers:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tell(self, event: str, *about: object) -> None:
        for key, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, event)(*about)
            except Exception as error:
                if self._trackers.pop(key, None) is None:
                    continue  # another thread was first to say so
                log.error("The tracker %s failed (%s: %s). The run goes on without it.", key, type(error).__name__,
                          error)
                log.debug("Why", exc_info=True)
                if event != "close":
                    with suppress(Exception):
                        tracker.close()

    def open(self) -> None:
        self._tell("open")

    def said(self, line: str) -> None:
        self._tell("said", line)

    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._tell("begin", plan, before)

    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        self._tell("waiting", needed, present, timeout_s)

    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        self._tell("asked", round, attempt, names)

    def fewer(self, round: int, connected: int, needed: int) -> None:
        self._tell("fewer", round, connected, needed)

    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        self._tell("overdue", round, names, missing)

    def doubted(self, round: int, why: str) -> None:
        self._tell("doubted", round, why)

    def uncompared(self, round: int, uploads: int) -> None:
        self._tell("uncompared", round, uploads)

    def held_up(self, reason: str) -> None:
        self._tell("held_up", reason)

    def answered(self, round: int, name: str, outcome: str) -> None:
        self._tell("answered", round, name, outcome)

    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        self._tell("evaluated", round, figures)

    def finished(self, record: RoundRecord) -> None:
        self._tell("finished", record)

    def ended(self, reason: str) -> None:
        self._tell("ended", reason)

    def close(self) -> None:
        self._tell("close")
