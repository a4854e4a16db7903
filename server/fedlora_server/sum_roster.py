"""The roster of a run with secure aggregation: who is in, when it is made anew, and who has agreed to it.

A roster is kept while all clients that are ready are in it, as their present processes are, and at least as many as its
threshold are ready. Else a new one is made of all that are ready. If they are too few for that, the old one is kept for
those who are in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from fedlora.identity.certificates import fingerprint
from fedlora.plan import Refusal, RunPlan
from fedlora.plan.limits import MOST_MEMBERS
from fedlora.privacy.mechanisms.distributed_gaussian import MOST_INFLATION
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.roster import Entry, Roster, run_digest
from fedlora.wire import pb
from fedlora.wire.sums import roster_to_wire

from . import sum_files
from .client_sampling import POLL_S, Clients, Ended
from .engine import Engine
from .observer import Observer, named
from .round_state import FOR_GOOD, RoundOptions
from .sum_answers import declined

ANSWER_S = 60.0
"""Seconds within which a client answers a question that needs no training."""

_SHAVED = 1 - 2.0**-40
"""Factor on the members' least noise, so that no member finds its own noise below the roster's by a rounding error."""

Keep = Callable[[Callable[[Path], None]], None]
"""A function that is given another one, and calls it with the run's folder, if the run has one."""


def formed(plan: RunPlan, members: Mapping[Entry, float], values: int) -> Roster:
    """Return the roster of these members.

    Args:
        plan: the run's plan.
        members: entry → the noise that the member adds at least, in units of the plan's clip norm; 0 if it does not
            say.
        values: the most values in a vector.

    Raises:
        ValueError: the members' sum could overflow, or the noise of one is not known and the plan fixes none.
    """
    said = [noise for noise in members.values() if noise]
    most = max(plan.least_noise, *said, 0.0 if len(said) == len(members) else 1.0)
    grid = Grid.fitting(values, clip_norm=plan.clip_norm, expected_batch=plan.expected_batch, members=len(members),
                        noise=most * (1 + MOST_INFLATION))
    least = max(plan.least_noise, min(members.values()))
    if not least:
        raise ValueError("a member does not say how much noise it adds, and the run fixes no least noise; give "
                         "--least-noise")
    return Roster(run_digest(plan), tuple(sorted(members, key=lambda entry: entry.name)), plan.colluding, grid, values,
                  least * grid.sensitivity(values, plan.clip_norm) * _SHAVED)


@dataclass(frozen=True)
class Present:
    """The clients with which a sum can begin now: node id → name. All of them are members and agreed to the roster."""

    roster: Roster
    names: Mapping[int, str]


class Rosters:
    """The rosters of a run, one after the other.

    Args:
        engine: reaches the clients.
        clients: which clients may be asked.
        plan: the run's plan.
        values: the most values in a vector.
        options: how rounds are run.
        observer: told what happens.
        stop: ends a wait when it is set.
        keep: stores each roster before anybody is told it.
        left: what an earlier server of the run left.
        renewed: called with the node id of each client of which a new roster holds another process than the one before.

    Attributes:
        roster: the present roster; None before the first.
        left: the attempt that an earlier server left, until it is taken up.
    """

    def __init__(self, engine: Engine, clients: Clients, plan: RunPlan, values: int, options: RoundOptions,
                 observer: Observer, stop: Event, keep: Keep, left: sum_files.Left | None = None, *,
                 renewed: Callable[[int], object] = lambda node: None) -> None:
        self._renewed = renewed
        self._engine, self._clients, self._plan, self._values = engine, clients, plan, values
        self._options, self._observer, self._stop, self.keep = options, observer, stop, keep
        self.left = left
        self.roster = left.roster if left is not None else None
        self._agreed: set[str] = set()
        self._unusable: dict[str, str] = {}  # name → why it can be in no roster
        self.refused: dict[str, Refusal] = {}

    def present(self, number: int, why: str = "") -> Present:
        """Wait until a sum can begin, and return the clients that are asked for it.

        Args:
            number: the round's number.
            why: why the attempt before did not succeed, for the reason if the run ends.

        Raises:
            Ended: the run was stopped, or too few clients were there for `wait_timeout_s`.
        """
        since, told = time.monotonic(), -1
        while True:
            if self._stop.is_set():
                raise Ended("stopped")
            ready = self._ready()
            needed, there = self._needed(ready), len(ready)
            if there >= needed and len(found := self._told(number, ready)) >= self._threshold:
                assert self.roster is not None
                return Present(self.roster, found)
            if time.monotonic() - since >= self._options.wait_timeout_s:
                raise Ended("wait-timeout", self._why_so_few(number, needed, there, why))
            if there < needed and told != there:
                told = there
                self._observer.waiting(needed, there, self._options.wait_timeout_s)
            self._engine.wait((), POLL_S)

    @property
    def _threshold(self) -> int:
        assert self.roster is not None
        return self.roster.threshold

    def _ready(self) -> dict[int, tuple[Entry, float]]:
        """Return what the clients gave that may be asked and can be in a roster, by node id."""
        memberships = self._engine.memberships()
        ready = {node: memberships[node] for node in self._clients.eligible() if node in memberships}
        keys: dict[str, str] = {}  # fingerprint → the first client with this key
        for node, (entry, noise) in list(ready.items()):
            first = keys.setdefault(fingerprint(entry.key), entry.name)
            if why := self._why_unusable(noise) or ("" if first == entry.name else (
                    f"its key is that of {first}, and members refuse a roster with one key twice; have it enroll with "
                    "a key of its own")):
                del ready[node]
                if self._unusable.get(entry.name) != why:
                    self._unusable[entry.name] = why
                    self._observer.left_out(entry.name, why)
        return ready

    def _why_unusable(self, noise: float) -> str:
        """Return why a client with this noise can be in no roster; "" if it can."""
        plan = self._plan
        if not noise and not plan.least_noise:
            return ("it does not say how much noise it adds (announce-size = false in its policy); give --least-noise, "
                    "or have it say so")
        try:
            Grid.fitting(self._values, clip_norm=plan.clip_norm, expected_batch=plan.expected_batch,
                         members=MOST_MEMBERS, noise=noise * (1 + MOST_INFLATION))
        except ValueError as error:
            return str(error)
        return ""

    def _fits(self, ready: Mapping[int, tuple[Entry, float]]) -> bool:
        """Return whether the present roster can be kept."""
        roster = self.roster
        if roster is None:
            return False
        members = [entry for entry, _ in ready.values() if roster.members.get(entry.name) == entry]
        others = len(ready) - len(members)
        return len(members) >= roster.threshold and (
            not others or len(roster.entries) == MOST_MEMBERS or len(ready) < self._plan.least_members)

    def _needed(self, ready: Mapping[int, tuple[Entry, float]]) -> int:
        """Return how many clients must be ready for a sum to begin."""
        return self._threshold if self._fits(ready) else self._plan.least_members

    def _told(self, number: int, ready: Mapping[int, tuple[Entry, float]]) -> dict[int, str]:
        """Return the clients that have agreed to the roster, node id → name. Make a new roster if it must be."""
        if not self._fits(ready):
            chosen, before = self._clients.draw(number, ready, MOST_MEMBERS), self.roster
            for node in chosen:
                if before is None or ready[node][0] not in before.entries:
                    self._renewed(node)
            self.roster, self._agreed = formed(self._plan, dict(ready[node] for node in chosen), self._values), set()
            self.keep(lambda out: sum_files.keep_roster(out, self._made))
            self._observer.rostered(number, tuple(self._made.members), self._made.threshold,
                                    self._made.digest.hex())
        roster = self._made
        members = {node: entry.name for node, (entry, _) in ready.items() if roster.members.get(entry.name) == entry}
        due = self._clients.in_time(number, members, roster.threshold)
        self._tell(number, {node: members[node] for node in due if members[node] not in self._agreed})
        agreed = {node: name for node, name in members.items() if name in self._agreed}
        in_time = set(self._clients.in_time(number, agreed, roster.threshold))
        return {node: name for node, name in agreed.items() if node in in_time}

    @property
    def _made(self) -> Roster:
        assert self.roster is not None
        return self.roster

    def _tell(self, number: int, members: Mapping[int, str]) -> None:
        """Tell members the roster, and note who agrees to it."""
        if not members:
            return
        request = pb.SumRequest(roster=roster_to_wire(self._made))
        answers = self._engine.confer(dict.fromkeys(members, request), min(ANSWER_S, self._options.round_timeout_s),
                                      self._stop, roster=self._made)
        for node, name in members.items():
            if node not in answers:
                continue
            why = declined(answers[node])
            if why is None:
                self._agreed.add(name)
                self.refused.pop(name, None)
                continue
            self.refused[name] = why
            self._observer.answered(number, name, f"does not take part in the roster: {why}")
            if why.code in FOR_GOOD:
                self._clients.declined.add(node)
        silent = [node for node in members if node not in answers and node in self._engine.memberships()]
        self._clients.missed(number, silent)

    def _why_so_few(self, number: int, needed: int, there: int, why: str) -> str:
        most = self._plan.max_participations
        spent = [entry.name for node, (entry, _) in self._engine.memberships().items()
                 if self._clients.participations[node] >= most]
        parts = [why, f"{there} of the {needed} clients that a sum needs are ready" if there < needed else
                 f"fewer than {needed} clients take part in the roster",
                 *([f"{named(spent)} trained {most} times and may not again (attempts that ended unopened count; a new "
                    "run needs a higher --max-participations)"] if spent else []),
                 *(f"{named(names)} declined: {code}" for code, names in _by_code(self.refused).items()),
                 *(f"{name} is left out: {reason}" for name, reason in self._unusable.items())]
        return f"round {number}: " + "; ".join(filter(None, parts))


def _by_code(refused: Mapping[str, Refusal]) -> dict[str, Collection[str]]:
    found: dict[str, list[str]] = {}
    for name, refusal in sorted(refused.items()):
        found.setdefault(refusal.code, []).append(name)
    return dict(found)
