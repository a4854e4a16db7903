"""The coordinator's display: a live table on a terminal, one line for each event anywhere else, plain or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from fedlora import figures
from fedlora.console import tell
from fedlora.figures import MAJORITY
from fedlora.json_lines import JsonConsole
from fedlora.plan import RunPlan
from fedlora.quantities import decimal, duration, quantity
from fedlora_server.observer import MOST_NAMED, ClientEvent, RoundRecord, named
from fedlora_server.peer_lines import PeerLines
from fedlora_server.phases import AGGREGATING, DOING
from fedlora_server.progress import Asked, Now
from fedlora_server.trackers import Tracker, Watched

SHOWN_ROUNDS, FEWEST_ROUNDS = 15, 3
"""Most rounds in the live table, and the number that a small terminal shows too. metrics.jsonl has them all."""
SHOWN_CLIENTS, FEWEST_CLIENTS = 12, 3
"""The same of the clients of the open round."""
OTHER_LINES = 9
"""Lines of the live display beside those of rounds and clients."""
KNOWN = {"": "working", "uploaded": "replied", "lost": "lost", "late": "late"}
"""Outcome of an order → what is shown; all else is the text of a refusal."""
REFRESHES = 2.0
"""Times a second that the live display is drawn anew."""

LOGGED = frozenset({"turned-away", "disconnected"})
"""Kinds of client events that the server logs as warnings by itself."""
ROUNDS_TELL = frozenset({"uploaded", "late"})
"""Kinds of client events that the round loop tells by itself, in `answered` and `overdue`."""
TROUBLE = frozenset({"refused", "late", "declined", "lost", "turned-away", "disconnected"})
"""Kinds of client events that are warnings as JSON lines."""


def shown(evaluation: Mapping[str, float]) -> str:
    """Return the figures as in "accuracy 0.812 (majority 0.600), loss 0.431"."""
    beside = {name: f" (majority {decimal(value)})" for name, value in evaluation.items() if name == MAJORITY}
    return ", ".join(f"{figures.title(name)} {decimal(value)}{beside.get(f'{name}/majority', '')}"
                     for name, value in figures.headline(evaluation).items())


class Display(Tracker):
    """The tracker that shows the run's events on the console."""

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._console, self._lines = run.console, PeerLines()
        self._records: list[RoundRecord] = []
        self._resumed: int | None = None
        self._asked_later = "asked as backup"
        self._status = ""
        self._live = Live(get_renderable=self._view, console=run.console, refresh_per_second=REFRESHES
                          ) if run.console.is_terminal else None
        self._as_json = isinstance(run.console, JsonConsole)

    @override
    def open(self) -> None:
        if self._live:
            self._live.start()

    @override
    def close(self) -> None:
        self._say("", quiet=True)
        if self._live:
            self._live.stop()

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._records = list(before)
        if plan.secure_aggregation:
            self._asked_later = "asked again"
        self._resumed = before[-1].round if before else None
        if self._resumed:
            first, last = next((r for r in before if r.evaluation), before[0]), before[-1]
            told = [f"rounds 1 to {self._resumed} are done" if self._resumed > 1 else "round 1 is done",
                    f"before training: {shown(first.evaluation)}" if not first.round and first.evaluation else "",
                    f"after round {last.round}: {shown(last.evaluation)}" if last.evaluation else ""]
            self._say("; ".join(filter(None, told)), "resumed", quiet=bool(self._live), round=self._resumed)

    @override
    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        limit = "" if timeout_s is None else f", for at most {timeout_s:.0f} s"
        self._say(f"waiting for {needed - present} more client{'s' * (needed - present != 1)} "
                  f"({present} of {needed} ready){limit}", "waiting")

    @override
    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        what = "asked" if attempt == 0 else self._asked_later
        self._say(f"round {round}: {what} {', '.join(names) if len(names) <= MOST_NAMED else len(names)}", "asked",
                  quiet=attempt == 0 and self._live is None, round=round, attempt=attempt)

    @override
    def fewer(self, round: int, connected: int, needed: int) -> None:
        self._say(f"round {round}: {connected} client{'s' * (connected != 1)} connected, fewer than --min-clients "
                  f"{needed}; the run goes on (--min-replies sets how many uploads a round needs)", "fewer", "warning",
                  round=round)

    @override
    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        lacking = f"; {missing} more upload{'s are' if missing != 1 else ' is'} needed" if missing else ""
        self._say(f"round {round}: {named(names)} did not answer within --round-timeout and will be left out of this "
                  f"round{lacking}", "overdue", "warning", round=round)

    @override
    def doubted(self, round: int, why: str) -> None:
        self._say(f"round {round}: the new state is unusable: {why}; it is computed again without the longest uploads",
                  "doubted", "warning", round=round)

    @override
    def uncompared(self, round: int, uploads: int) -> None:
        self._say(f"round {round}: with {uploads} upload{'s' * (uploads != 1)} and no earlier round to compare with, "
                  "an unusually long upload would not be noticed", "uncompared", "warning", round=round)

    @override
    def held_up(self, reason: str) -> None:
        self._say(f"the run waits: {reason}", "held-up", "warning")

    @override
    def rostered(self, round: int, names: tuple[str, ...], threshold: int, digest: str) -> None:
        self._say(f"round {round}: a new roster of {len(names)} ({named(names)}), digest {digest[:12]}; a sum needs "
                  f"{threshold} of them", "rostered", round=round)

    @override
    def left_out(self, name: str, why: str) -> None:
        self._say(f"{name} can be in no roster: {why}", "no-member", "warning", client=name)

    @override
    def unopened(self, round: int, attempt: int, why: str) -> None:
        self._say(f"round {round}: attempt {attempt} ended unopened: {why}. What its clients charged stands",
                  "unopened", "warning", round=round, attempt=attempt)

    @override
    def answered(self, round: int, name: str, outcome: str) -> None:
        if not (self._as_json and outcome == "uploaded"):  # which `client` has told
            self._say(f"round {round}: {name} {outcome}", "answered", "warning",
                      quiet=outcome == "uploaded" and not self._live, round=round, client=name)

    @override
    def finished(self, record: RoundRecord) -> None:
        self._records.append(record)
        if record.round == 0:
            start = f"start released by {len(record.uploaded)} of {len(record.cohort)}" if record.cohort else ""
            self._say("before training: " + ", ".join(filter(None, (start, shown(record.evaluation)))), "finished",
                      round=0)
            return
        took_part = f"{len(record.uploaded)} of {len(record.cohort)}"
        parts = [f"sum of {took_part} opened" if record.roster else f"{took_part} replied", shown(record.evaluation),
                 "" if record.update_norm is None else f"update {record.update_norm:.3g}",
                 f"{quantity(record.bytes_up)} up, {quantity(record.bytes_down)} down", f"{record.seconds:.1f} s",
                 "" if (left := self.run.progress.now().run_left_s) is None or left <= 0
                 else f"about {duration(left)} left"]
        self._say(f"round {record.round}: " + ", ".join(filter(None, parts)), "finished", quiet=bool(self._live),
                  round=record.round)
        for name, reason in record.rejected.items():
            self._say(f"round {record.round}: the upload of {name} was rejected: {reason}", "left-out", "warning",
                      round=record.round, client=name)
        for name, how in record.curbed.items():
            self._say(f"round {record.round}: the upload of {name} weighs less than it claims: {how}", "curbed",
                      "warning", round=record.round, client=name)

    @override
    def ended(self, reason: str) -> None:
        if self._as_json:
            self._say(f"the rounds have ended: {reason}", "ended", code=reason)

    @override
    def said(self, line: str) -> None:
        (self._live.console if self._live else self._console).print(line, highlight=False, markup=False)

    @override
    def client(self, event: ClientEvent) -> None:
        if not self._as_json and event.kind in LOGGED | ROUNDS_TELL:
            return
        more = "" if event.kind == "uploaded" else self._lines.admit(event.name, event.kind)
        if more is None:
            return
        line = f"{event.name} {event.kind}{f': {event.detail}' if event.detail else ''}{more}"
        if self._as_json:
            tell(self._console, line, event.kind, "warning" if event.kind in TROUBLE else "info", client=event.name,
                 code=event.code, peer=event.peer, round=event.round, attempt=event.attempt,
                 bytes=event.upload_bytes or None)
        else:
            self.said(line)

    def _say(self, status: str, event: str = "", level: str = "info", *, quiet: bool = False, round: int | None = None,
             attempt: int | None = None, client: str | None = None, code: str | None = None) -> None:
        if self._live:
            self._status = status
        elif status and (not quiet or self._as_json):
            tell(self._console, status, event, level, round=round, attempt=attempt, client=client, code=code)

    def _view(self) -> Group:
        """Return what a terminal shows: the last rounds, the last event, and the clients of the open round."""
        now, room = self.run.progress.now(), self._console.height - OTHER_LINES
        asked = min(len(now.asked), SHOWN_CLIENTS, max(FEWEST_CLIENTS, room // 2))
        parts: list[Table | Text] = [self._table(min(SHOWN_ROUNDS, max(FEWEST_ROUNDS, room - asked)))]
        parts.append(Text(self._status, style="dim"))
        if now.asked:
            parts += [Text(_open_round(now)), _clients(now.asked, asked)]
        return Group(*parts)

    def _table(self, most: int) -> Table:
        measured = list(dict.fromkeys(name for r in self._records for name in figures.headline(r.evaluation)))
        majority = next((r.evaluation[MAJORITY] for r in self._records if MAJORITY in r.evaluation), None)
        table = Table(title=self.run.title, title_justify="left", box=None, pad_edge=False,
                      caption=None if majority is None else f"the most frequent label alone gives {decimal(majority)}",
                      caption_justify="left")
        for name in ("round", "replies", *map(figures.title, measured), "update", "up", "down",
                     "seconds"):
            table.add_column(name, justify="right")
        for record in self._records[-most:]:
            earlier = "dim" if self._resumed is not None and record.round <= self._resumed else None
            evaluated = [decimal(record.evaluation[m]) if m in record.evaluation else "" for m in measured]
            if record.round == 0:
                table.add_row("0", "", *evaluated, style=earlier)
                continue
            table.add_row(str(record.round), f"{len(record.uploaded)}/{len(record.cohort)}", *evaluated,
                          "" if record.update_norm is None else f"{record.update_norm:.3g}",
                          quantity(record.bytes_up), quantity(record.bytes_down), f"{record.seconds:.1f}",
                          style=earlier)
        return table


def _open_round(now: Now) -> str:
    """Return the open round in a line: who has replied, and the time that is left."""
    outcomes = Counter(KNOWN.get(one.outcome, "declined") for one in now.asked)
    counts = [f"{outcomes['replied']} of {len(now.asked)} replied",
              *(f"{outcomes[what]} {what}" for what in ("working", "lost", "late", "declined") if outcomes[what])]
    if now.phase == AGGREGATING:
        counts.append(DOING[AGGREGATING])
    if now.round_left_s is not None:
        counts.append(f"{duration(now.round_left_s)} left for the round")
    if now.run_left_s is not None:
        counts.append(f"about {duration(now.run_left_s)} for the run")
    return f"round {now.current} of {now.planned}: {', '.join(counts)}"


def _clients(asked: Sequence[Asked], most: int) -> Table:
    """Return a line for each of `most` clients: first those that work, the longest first, then the last replies."""
    order = sorted(asked, key=lambda one: (bool(one.outcome), one.outcome == "uploaded",
                                           -one.seconds if not one.outcome else -one.since - one.seconds))
    table = Table(box=None, show_header=False, pad_edge=False)
    for one in order[:most]:
        table.add_row(Text(f"  {one.name}"), Text(_state(one)))
    if len(order) > most:
        table.add_row(f"  and {len(order) - most} more", "")
    return table


def _state(one: Asked) -> str:
    if not one.outcome:
        return f"working since {datetime.fromtimestamp(one.since):%H:%M:%S}, for {duration(one.seconds)}"
    state = KNOWN.get(one.outcome, "declined")
    return f"{state} after {duration(one.seconds)}" + (f": {one.outcome}" if state == "declined" else "")


TRACKER = Display
