"""One round that is under way: whom it asked, what they answered, and when backup clients are asked."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event

from flwr.app import ArrayRecord, ConfigRecord

from fedlora.plan import Refusal
from fedlora_strategies import FederatedLoRA

from .client_sampling import POLL_S, RETURN_S, Clients, Ended
from .engine import Engine, Outcome, Replies
from .observer import Observer, named

ASKS_PER_ROUND = 3
"""A client that declines, or lost the frozen tensors, is asked again in later attempts, up to so often per round."""

BACKUPS_PER_ROUND = 16
"""So often a round asks backup clients: whoever makes up names has one for each time."""

BACKUPS_AT_ONCE = 4
"""After so many times, each one more waits: for a second, and then twice as long as the one before."""

TRAINED_NOTHING = frozenset({"missing-tensors", "too-late"})
"""Refusals that come before the client's training starts and do not use up a participation."""

MOST_REASONS = 3
"""That are told of why a round came to nothing."""

FOR_GOOD = frozenset({"policy", "budget", "model-mismatch", "version-mismatch", "privacy-mismatch", "labels"})
"""Refusals after which a client is not asked again in this run."""


@dataclass(frozen=True)
class RoundOptions:
    """How rounds are run; nothing here is sent to clients.

    Attributes:
        seed: of the cohorts.
        clients_per_round: size of a cohort; None takes every eligible client.
        min_clients: round 1 waits, without limit, until so many are connected; a run that is taken up after it, for
            `RETURN_S`.
        min_replies: uploads without which no round closes. None for half, rounded up and at least 1, of those asked
            first that are neither lost nor declined; until the first attempt's time is up, and as long as there are
            idle clients to ask, for half of all of them.
        round_timeout_s: how long each attempt's clients have to answer. Who does not is told to stop, and lost to the
            round.
        wait_timeout_s: how long a round with nobody at work and nobody left to ask waits before the run ends.
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
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.clients_per_round and self.min_replies and self.min_replies > self.clients_per_round:
            raise ValueError(f"--min-replies is {self.min_replies}, more than the {self.clients_per_round} clients "
                             "that are asked in a round; lower --min-replies or raise --clients-per-round")

    def rounds_within(self, plan_rounds: int, max_participations: int) -> int:
        """How many rounds `min_clients` clients can close if each starts at most `max_participations`."""
        cohort = min(self.clients_per_round or self.min_clients, self.min_clients)
        needed = self.min_replies or -(-cohort // 2)
        return min(plan_rounds, max_participations * self.min_clients // needed) if needed <= self.min_clients else 0


class OpenRound:
    """One round from its first order to its last upload.

    Attributes:
        names of clients: cohort (all asked), uploaded, lost (gone, or out of time), refused (→ code).
    """

    def __init__(self, engine: Engine, strategy: FederatedLoRA, clients: Clients, number: int, options: RoundOptions,
                 observer: Observer, stop: Event) -> None:
        self._engine, self._strategy, self._clients, self._number = engine, strategy, clients, number
        self._options, self._observer, self._stop = options, observer, stop
        self._asks: Counter[int] = Counter()
        self._open: dict[str, int] = {}
        self._uploads: dict[int, str] = {}
        self._told: dict[str, str] = {}
        self._lost: set[int] = set()
        self._late: set[int] = set()
        self._until: dict[int, float] = {}  # attempt → its deadline
        self._orders: dict[str, int] = {}  # message → attempt
        self._alone_since: float | None = None
        self._backups_asked, self._backups_from = 0, -math.inf
        self._looked_at, self._told_held_up = time.monotonic(), False
        self._refusals: dict[str, Refusal] = {}
        self._attempts = list(clients.asked_before(number))
        self._awaited = {name: attempt for attempt, names in enumerate(self._attempts) for name in names}

    @property
    def attempts(self) -> int:
        """How many times somebody was asked."""
        return len(self._attempts)

    @property
    def cohort(self) -> tuple[str, ...]:
        return tuple(self._engine.name_of(node) for node in self._asks)

    @property
    def uploaded(self) -> tuple[str, ...]:
        return tuple(sorted(self._engine.name_of(node) for node in self._uploads))

    @property
    def refused(self) -> dict[str, str]:
        return {name: refusal.code for name, refusal in self._refusals.items()}

    @property
    def lost(self) -> tuple[str, ...]:
        return tuple(sorted(self._engine.name_of(node) for node in self._lost | self._late))

    def collect(self, arrays: ArrayRecord) -> Replies:
        """Ask until enough have uploaded; then the replies in order of node id, each read when it is its turn.

        Raises:
            Ended: stopped, or nobody came for `wait_timeout_s`. Open orders are not cancelled: clients finish what they
                have begun and keep it, for the run may be taken up again.
        """
        self._run(arrays)
        self._engine.cancel(list(self._open))
        self._strategy.expect_none_of(node for node in self._asks if node not in self._uploads)
        self._clients.came_in_time(self._uploads)
        return Replies(self._engine, [self._uploads[node] for node in sorted(self._uploads)])

    def _run(self, arrays: ArrayRecord) -> None:
        self._begin(arrays)
        while True:
            self._listen(arrays)
            self._give_up_the_late()
            pending = sum(node not in self._lost for node in self._open.values())
            missing = self._wanted - len(self._uploads)
            if missing > pending and (backups := self._backups(missing - pending)):
                self._ask_instead(backups, arrays)
            elif not pending:
                if missing <= 0 or self._is_enough():
                    return
                continue
            self._alone_since = None

    @property
    def _wanted(self) -> int:
        """Uploads for which backup clients are asked."""
        if time.monotonic() >= min(self._until.values(), default=math.inf):
            return self._needed
        return self._options.min_replies or -(-len(self._attempts[0]) // 2)

    @property
    def _needed(self) -> int:
        """Uploads without which the round does not close."""
        if self._options.min_replies:
            return self._options.min_replies
        left = set(self._attempts[0]) - set(self.lost) - self._refusals.keys() - self._awaited.keys()
        return max(1, -(-len(left) // 2))

    def _give_up_the_late(self) -> None:
        """Those whose time is up are told to stop, and lost to the round: what they still send is too late."""
        now = time.monotonic()
        late = {message: node for message, node in self._open.items() if now >= self._until[self._orders[message]]}
        if not late:
            return
        self._engine.cancel(list(late))
        for message in late:
            del self._open[message]
        nodes = set(late.values())
        self._late |= nodes
        self._lost -= nodes
        self._clients.missed(self._number, nodes)
        self._observer.overdue(self._number, tuple(sorted(map(self._engine.name_of, nodes))),
                               max(0, self._wanted - len(self._uploads)))

    def _begin(self, arrays: ArrayRecord) -> None:
        """Ask the cohort, or wait for the one that an earlier server asked."""
        if self._awaited:
            self._await_return()
            return
        present = self._clients.wait_for(1, self._options.wait_timeout_s, self._stop, self._observer)
        self._clients.tell_if_fewer(self._number, self._options.min_clients, self._observer)
        quorum = self._options.min_replies or -(-(self._options.clients_per_round or 1) // 2)
        present = self._clients.in_time(self._number, present, quorum)
        self._ask(self._clients.draw(self._number, present, self._options.clients_per_round), arrays)

    def _listen(self, arrays: ArrayRecord) -> None:
        """Take the next answers, and ask at once those that are back and those that must be sent more."""
        if self._stop.is_set():
            raise Ended("stopped")
        outcomes = self._engine.wait(list(self._open), POLL_S)
        self._stand_still()
        self._ask_again(arrays)  # before backup clients are
        if forgetful := self._take_note(outcomes):
            self._ask(forgetful, arrays)

    def _stand_still(self) -> None:
        """Nobody's time passes while this machine cannot store what comes."""
        before, self._looked_at = self._looked_at, time.monotonic()
        if not (reason := self._engine.held_up):
            return
        self._until = {attempt: until + self._looked_at - before for attempt, until in self._until.items()}
        if not self._told_held_up:
            self._told_held_up = True
            self._observer.held_up(f"uploads cannot be stored ({reason}). They are taken when they can; Ctrl-C stops "
                                   "the run")

    def _is_enough(self) -> bool:
        """Whether the round closes with what is there. Nobody trains, and nobody is left to ask: whoever is lost has
        `RETURN_S` to come back.

        Raises:
            Ended: too few are there, and so it has been for `wait_timeout_s`.
        """
        lacking, limit = self._needed - len(self._uploads), self._options.wait_timeout_s
        now = time.monotonic()
        if self._alone_since is None:
            self._alone_since = now
            if lacking > 0:
                self._observer.waiting(lacking, 0, limit)
        elif lacking > 0 and now - self._alone_since >= limit:
            raise Ended("wait-timeout", self._why_so_few())
        return lacking <= 0 and (not self._lost or now - self._alone_since >= min(RETURN_S, limit))

    def _why_so_few(self) -> str:
        """What became of those that were asked and did not upload: the reasons of most of them."""
        by_reason: dict[str, list[str]] = {}
        for name, refusal in sorted(self._refusals.items()):
            by_reason.setdefault(f"declined: {refusal}", []).append(name)
        if self.lost:
            by_reason["lost"] = list(self.lost)
        most = sorted(by_reason.items(), key=lambda item: -len(item[1]))[:MOST_REASONS]
        told = "; ".join(f"{named(names)} {reason}" for reason, names in most)
        return told and f"round {self._number}: {told}"

    def _backups(self, count: int) -> list[int]:
        """Idle clients for a further attempt, those first that were not asked in this round."""
        if self._backups_asked == BACKUPS_PER_ROUND:
            return []
        busy = {*self._open.values(), *self._uploads, *self._late}
        free = [n for n in self._clients.eligible() if n not in busy and self._asks[n] < ASKS_PER_ROUND
                and self._engine.name_of(n) not in self._awaited]  # who has trained already is asked for that
        drawn = self._clients.draw(self._number, free, None)
        return sorted(drawn, key=lambda node: self._asks[node])[:count]

    def _await_return(self) -> None:
        """Clients that an earlier server asked in this round look for this one."""
        deadline = time.monotonic() + RETURN_S
        while self._awaited.keys() - map(self._engine.name_of, self._engine.idle()) and time.monotonic() < deadline:
            if self._stop.is_set():
                raise Ended("stopped")
            self._engine.wait((), POLL_S)

    def _ask_again(self, arrays: ArrayRecord) -> None:
        """Those of an earlier server's clients that are back, for the attempt that they know: who trained for it sends
        what he stored, and nobody trains twice.
        """
        if not self._awaited:
            return
        back: dict[int, list[int]] = {}
        for node in self._engine.idle():
            attempt = self._awaited.pop(self._engine.name_of(node), None)
            if attempt is not None:
                back.setdefault(attempt, []).append(node)
        for attempt, nodes in sorted(back.items()):
            self._send(attempt, nodes, arrays)

    def _ask_instead(self, backups: list[int], arrays: ArrayRecord) -> None:
        """Ask backup clients, unless it is too soon after the last ones."""
        now = time.monotonic()
        if now >= self._backups_from:
            self._backups_asked += 1
            if self._backups_asked >= BACKUPS_AT_ONCE:
                self._backups_from = now + 2.0 ** (self._backups_asked - BACKUPS_AT_ONCE)
            self._ask(backups, arrays)

    def _ask(self, nodes: list[int], arrays: ArrayRecord) -> None:
        self._clients.participations.update(nodes)
        self._attempts.append(tuple(sorted(map(self._engine.name_of, nodes))))
        self._clients.remember(self._number, self._attempts)
        self._send(self.attempts - 1, nodes, arrays)

    def _send(self, attempt: int, nodes: list[int], arrays: ArrayRecord) -> None:
        nodes = sorted(nodes)
        until = self._until.setdefault(attempt, time.monotonic() + self._options.round_timeout_s)
        config = ConfigRecord({"nodes": nodes, "attempt": attempt,
                               "deadline_s": max(0.0, until - time.monotonic())})
        messages = self._strategy.configure_train(self._number, arrays, config, self._engine)
        names = tuple(sorted(self._engine.name_of(node) for node in nodes))
        self._observer.asked(self._number, attempt, names)
        for node, message_id in zip(nodes, self._engine.push_messages(messages), strict=True):
            self._open[message_id], self._orders[message_id] = node, attempt
            self._asks[node] += 1

    def _take_note(self, outcomes: Mapping[str, Outcome]) -> list[int]:
        """Sort the answers; returns the nodes that must be sent the frozen tensors again."""
        forgetful = []
        self._lost = {self._open[m] for m, outcome in outcomes.items() if outcome == "lost" and m in self._open}
        for message_id, outcome in outcomes.items():
            node = self._open.get(message_id)
            if node is None:
                continue
            name = self._engine.name_of(node)
            if self._told.get(message_id) != str(outcome):
                self._told[message_id] = str(outcome)
                self._observer.answered(self._number, name, str(outcome))
            if outcome == "lost":
                continue
            del self._open[message_id]
            if isinstance(outcome, Refusal):
                forgetful += self._decline(node, name, outcome)
            else:
                self._uploads[node] = message_id
                self._refusals.pop(name, None)
        return forgetful

    def _decline(self, node: int, name: str, refusal: Refusal) -> list[int]:
        self._refusals[name] = refusal
        if refusal.code in FOR_GOOD:
            self._clients.declined.add(node)
        if refusal.code in TRAINED_NOTHING:
            self._clients.participations[node] -= 1
        if refusal.code == "too-late":
            self._late.add(node)
            self._clients.missed(self._number, [node])
        if refusal.code == "missing-tensors":
            self._strategy.forget(node)
            return [node] if self._asks[node] < ASKS_PER_ROUND else []
        return []
