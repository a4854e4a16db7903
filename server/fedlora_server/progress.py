"""What a run does now, for the display, the page report.html, `fedlora-server status` and /metrics."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from typing_extensions import override

from fedlora.plan import RunPlan

from .observer import ClientEvent, RoundRecord, Watcher
from .phases import AGGREGATING, ENDING, HELD_UP, STARTING, SUMMING, TRAINING, WAITING

RECENT = 10
"""Number of finished rounds from whose durations the run's end is forecast."""


@dataclass(frozen=True)
class Asked:
    """A client that was asked in the current round.

    Attributes:
        name: its name.
        since: Unix time at which it was asked last.
        outcome: "" while it works; else "uploaded", "lost", "late" or the text of its refusal.
        seconds: how long it took for its outcome, or has been working.
    """

    name: str
    since: float
    outcome: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Now:
    """What a run does at one moment. Counts begin with this server, not with the run.

    Attributes:
        phase: one of `fedlora_server.phases.PHASES`.
        why: more about the phase, for the coordinator to read; may be "".
        since: Unix time at which the phase began.
        planned: number of rounds in the plan; 0 before it is known.
        finished: number of the last finished round, of earlier servers too.
        current: the round that clients train for, or that is aggregated; else the next one.
        finished_at: Unix time at which a round finished last; None before the first.
        asked: the clients asked in the current round, in the order in which they were asked first; () between rounds.
        round_left_s: seconds that clients still have for the current round; None if none trains or there is no limit.
        run_left_s: seconds until the run's end, if further rounds last as long as the recent ones; None if that cannot
            be said.
        uploads: uploads that arrived whole and in time.
        rejected: uploads that a round left out.
        refusals: code → how often a client or the server refused.
        turned_away: code → how often a client was not let in.
        lost: how often a client's stream broke.
        disconnected: how often a client was put out.
        evaluation: the last figures on the server's own data.
    """

    phase: str = STARTING
    why: str = ""
    since: float = 0.0
    planned: int = 0
    finished: int = 0
    current: int = 0
    finished_at: float | None = None
    asked: tuple[Asked, ...] = ()
    round_left_s: float | None = None
    run_left_s: float | None = None
    uploads: int = 0
    rejected: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    turned_away: Mapping[str, int] = field(default_factory=dict)
    lost: int = 0
    disconnected: int = 0
    evaluation: Mapping[str, float] = field(default_factory=dict)


class Progress(Watcher):
    """The observer that knows what the run does now. Any thread may ask it.

    Args:
        round_timeout_s: seconds that clients have to answer in a round.
    """

    def __init__(self, round_timeout_s: float = math.inf) -> None:
        self._round_timeout_s = round_timeout_s
        self._lock = threading.Lock()
        self._now = Now(since=time.time())
        self._held_up: tuple[str, float] | None = None
        self._refusals: Counter[str] = Counter()
        self._turned_away: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._began = self._until = 0.0  # of the current round, by the monotonic clock
        self._asked: dict[str, tuple[Asked, float]] = {}  # with the time of asking, by the monotonic clock

    def now(self, held_up: str = "") -> Now:
        """Return what the run does now.

        Args:
            held_up: why uploads cannot be stored at this moment (`Engine.held_up`).
        """
        with self._lock:
            now, clock = self._now, time.monotonic()
            left = max(0.0, self._until - clock) if now.phase == TRAINING and math.isfinite(self._until) else None
            ends, between = None, now.phase == WAITING and not now.why
            if self._seconds and (between or now.phase in (TRAINING, SUMMING, AGGREGATING)):
                usual = statistics.median(self._seconds)
                ends = usual * (now.planned - now.finished) - (0 if between else min(usual, clock - self._began))
            asked = tuple(one if one.outcome else replace(one, seconds=clock - at) for one, at in self._asked.values())
            if self._held_up is not None or held_up:
                why, since = self._held_up or (held_up, now.since)
                now, ends = replace(now, phase=HELD_UP, why=why, since=since), None
            return replace(now, asked=asked, round_left_s=left, run_left_s=ends, refusals=dict(self._refusals),
                           turned_away=dict(self._turned_away))

    def _turn(self, phase: str, why: str = "", **about: int) -> None:
        """Begin a phase, or go on with it. Called under the lock."""
        since = self._now.since if phase == self._now.phase else time.time()
        self._now, self._held_up = replace(self._now, phase=phase, why=why, since=since, **about), None  # type: ignore[arg-type]

    def _came_out(self, name: str, outcome: str) -> None:
        """Note what became of an order. Called under the lock."""
        if name in self._asked:
            one, at = self._asked[name]
            self._asked[name] = replace(one, outcome=outcome, seconds=time.monotonic() - at), at

    @override
    def client(self, event: ClientEvent) -> None:
        with self._lock:
            if event.kind in ("refused", "declined"):
                self._refusals[event.code] += 1
            elif event.kind == "turned-away":
                self._turned_away[event.code] += 1
            elif event.kind == "uploaded":
                self._now = replace(self._now, uploads=self._now.uploads + 1)
            elif event.kind == "lost":
                self._now = replace(self._now, lost=self._now.lost + 1)
            elif event.kind == "disconnected":
                self._now = replace(self._now, disconnected=self._now.disconnected + 1)
            elif event.kind == "rejoined" and event.name in self._asked:
                one, at = self._asked[event.name]
                if one.outcome == "lost":
                    self._asked[event.name] = replace(one, outcome="", seconds=0.0), at

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        with self._lock:
            finished = before[-1].round if before else 0
            self._turn(STARTING, planned=plan.rounds, finished=finished, current=min(finished + 1, plan.rounds))
            self._seconds.extend(record.seconds for record in before if record.round)
            if evaluated := [record.evaluation for record in before if record.evaluation]:
                self._now = replace(self._now, evaluation=evaluated[-1])

    @override
    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        with self._lock:
            self._turn(WAITING, f"{needed - present} more needed ({present} of {needed} ready)")

    @override
    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        with self._lock:
            clock = time.monotonic()
            if self._now.phase not in (SUMMING, TRAINING):
                self._began = clock if attempt == 0 else self._began or clock
            self._until = clock + self._round_timeout_s
            self._asked |= {name: (Asked(name, time.time()), clock) for name in names}
            self._turn(TRAINING, current=round)

    @override
    def summing(self, round: int, phase: str) -> None:
        with self._lock:
            if phase != TRAINING:  # which `asked` tells
                if self._now.phase not in (SUMMING, TRAINING):
                    self._began = time.monotonic()
                self._turn(SUMMING, phase, current=round)

    @override
    def answered(self, round: int, name: str, outcome: str) -> None:
        with self._lock:
            self._held_up = None
            self._came_out(name, outcome)

    @override
    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        with self._lock:
            self._held_up = None
            for name in names:
                self._came_out(name, "late")

    @override
    def combining(self, round: int, uploads: int) -> None:
        with self._lock:
            self._turn(AGGREGATING, current=round)

    @override
    def held_up(self, reason: str) -> None:
        with self._lock:
            self._held_up = reason, time.time()

    @override
    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        with self._lock:
            self._now = replace(self._now, evaluation=dict(figures))

    @override
    def finished(self, record: RoundRecord) -> None:
        with self._lock:
            self._asked.clear()
            self._now = replace(self._now, rejected=self._now.rejected + len(record.rejected))
            if record.round:
                self._seconds.append(record.seconds)
                self._now = replace(self._now, finished=record.round, finished_at=time.time())
            if record.round < self._now.planned:
                self._turn(WAITING, current=record.round + 1)
            else:
                self._turn(ENDING)

    @override
    def ended(self, reason: str) -> None:
        with self._lock:
            self._turn(ENDING, reason)

    @override
    def close(self) -> None:
        with self._lock:
            self._turn(ENDING, self._now.why if self._now.phase == ENDING else "")
