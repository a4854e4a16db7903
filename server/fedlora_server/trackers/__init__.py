"""Trackers: they watch a run, and show or store what they see. Each file of this folder is one, found by its name.

A file defines `TRACKER`, a subclass of `Tracker`. The files that a run needs to be resumed, such as metrics.jsonl, are
written whichever trackers watch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from typing_extensions import override

from fedlora import registry
from fedlora.plan import RunPlan
from fedlora_server.observer import ClientEvent, RoundRecord, Watcher
from fedlora_server.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """All that trackers learn of a run before it begins.

    Attributes:
        title: the run in a few words.
        out: the run's folder, which exists.
        console: the console that the coordinator reads; stderr by convention, so that a command's output can be piped.
        options: the command's options by name, with the preset's value for each that was not given.
        run_id: the run's id, 16 hexadecimal digits.
        fingerprint: SHA-256 of the server's public key, in hexadecimal digits; "" without TLS.
        together: a folder that all runs of one command share, for stores that show runs side by side; None for `out`.
        progress: what the run does now. It hears of each event before the trackers do.
        joined: returns what each client disclosed when it joined, by name. Called once the rounds have begun.
    """

    title: str
    out: Path
    console: Console
    options: Mapping[str, object]
    run_id: str = ""
    fingerprint: str = ""
    together: Path | None = None
    progress: Progress = field(default_factory=Progress)
    joined: Callable[[], Mapping[str, Mapping[str, object]]] = dict


class Tracker(Watcher):
    """An observer with a beginning and an end, made for one run. Override the methods of interest.

    If a method raises, the failure is logged and the tracker hears no more. The run goes on.

    Args:
        run: the run to watch.

    Attributes:
        needs: class attribute, packages that it imports when a run begins → what to give to pip to install them.
    """

    needs: ClassVar[Mapping[str, str]] = {}

    def __init__(self, run: Watched) -> None:
        self.run = run


def check_installed(keys: Iterable[str]) -> None:
    """Check that the packages are there which these trackers need, without importing them.

    Raises:
        ValueError: a package is not installed.
    """
    for key in keys:
        needs: Mapping[str, str] = registry.load("fedlora_server.trackers", key).TRACKER.needs
        for package, install in needs.items():
            if find_spec(package) is None:
                raise ValueError(f"--track {key} needs {package}, which is not installed: pip install '{install}'")


class Trackers(Tracker):
    """Several trackers that act as one, and a context manager that opens and closes them around the run.

    Args:
        keys: names of files in `fedlora_server.trackers`, in any order.
        run: the run to watch.
        others: further trackers by name, which are no files of that folder.
    """

    def __init__(self, keys: Iterable[str], run: Watched, others: Mapping[str, Tracker] | None = None) -> None:
        super().__init__(run)
        self._trackers: dict[str, Watcher] = {"progress": run.progress, **(others or {})}
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
                    continue  # another thread has logged it already
                log.error("The tracker %s failed (%s: %s). The run goes on without it.", key, type(error).__name__,
                          error)
                log.debug("Why", exc_info=True)
                if event != "close":
                    with suppress(Exception):
                        tracker.close()

    @override
    def open(self) -> None:
        self._tell("open")

    @override
    def said(self, line: str) -> None:
        self._tell("said", line)

    @override
    def client(self, event: ClientEvent) -> None:
        self._tell("client", event)

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._tell("begin", plan, before)

    @override
    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        self._tell("waiting", needed, present, timeout_s)

    @override
    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        self._tell("asked", round, attempt, names)

    @override
    def fewer(self, round: int, connected: int, needed: int) -> None:
        self._tell("fewer", round, connected, needed)

    @override
    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        self._tell("overdue", round, names, missing)

    @override
    def doubted(self, round: int, why: str) -> None:
        self._tell("doubted", round, why)

    @override
    def uncompared(self, round: int, uploads: int) -> None:
        self._tell("uncompared", round, uploads)

    @override
    def held_up(self, reason: str) -> None:
        self._tell("held_up", reason)

    @override
    def rostered(self, round: int, names: tuple[str, ...], threshold: int, digest: str) -> None:
        self._tell("rostered", round, names, threshold, digest)

    @override
    def left_out(self, name: str, why: str) -> None:
        self._tell("left_out", name, why)

    @override
    def summing(self, round: int, phase: str) -> None:
        self._tell("summing", round, phase)

    @override
    def unopened(self, round: int, attempt: int, why: str) -> None:
        self._tell("unopened", round, attempt, why)

    @override
    def answered(self, round: int, name: str, outcome: str) -> None:
        self._tell("answered", round, name, outcome)

    @override
    def combining(self, round: int, uploads: int) -> None:
        self._tell("combining", round, uploads)

    @override
    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        self._tell("evaluated", round, figures)

    @override
    def finished(self, record: RoundRecord) -> None:
        self._tell("finished", record)

    @override
    def ended(self, reason: str) -> None:
        self._tell("ended", reason)

    @override
    def close(self) -> None:
        self._tell("close")
