"""One round while it is open: which clients it asked, what they answered, and when it asks backup clients."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Event

from flwr.app import ArrayRecord, ConfigRecord

from fedlora.plan import MOST_RANK, Refusal
from fedlora_strategies import FederatedLoRA

from .client_sampling import POLL_S, RETURN_S, Clients, Ended
from .engine import Engine, Outcome, Replies
from .observer import Observer, named

ASKS_PER_ROUND = 3
"""How often a round asks one client. It asks again if the client declined or lost the frozen tensors."""

BACKUPS_PER_ROUND = 16
"""How often a round asks backup clients. Without a limit, someone who makes up names could prolong it for ever."""

BACKUPS_AT_ONCE = 4
"""How often backup clients are asked without delay. After that they are asked 1 s later, then 2 s, 4 s, …."""

TRAINED_NOTHING = frozenset({"missing-tensors", "too-late"})
"""Refusal codes of clients that did not begin to train, so that no participation is used up."""

MOST_REASONS = 3
"""Largest number of reasons named when a round fails."""

FOR_GOOD = frozenset({"policy", "budget", "model-mismatch", "version-mismatch", "privacy-mismatch", "labels"})
"""Refusal codes after which a client is not asked again in this run."""


def held_up(reason: str) -> str:
    """Return what is told of uploads that this machine cannot store for now."""
    return f"uploads cannot be stored ({reason}). The run goes on as soon as they can; Ctrl-C stops it"


@dataclass(frozen=True)
class RoundOptions:
    """The options of the round loop. None of them is sent to clients.

    Attributes:
        seed: decides the cohorts.
        clients_per_round: size of a cohort; None for every eligible client.
        min_clients: round 1 waits, without limit, until so many clients are connected. A resumed run waits for them for
            `RETURN_S` seconds.
        min_replies: number of uploads that a round needs to close. None for half of the round's first cohort, rounded
            up and at least 1. Clients that are lost or decline no longer count in the cohort once its time is up or no
            idle client can replace them.
        round_timeout_s: seconds that each attempt's clients have to answer. A client that does not is told to stop and
            counts as lost.
        wait_timeout_s: seconds that a round waits, with no client at work and none left to ask, before the run ends.
        evaluate_every: evaluate after every so many rounds, and after the last.
        fewest_uploads: number of uploads that the run's reduction needs. No round closes with fewer.
        client_ranks: client name → how many ranks it trains; all others train the adapter's.

    Raises:
        ValueError: an option is out of its range or contradicts another.
    """

    seed: int
    clients_per_round: int | None = None
    min_clients: int = 1
    min_replies: int | None = None
    round_timeout_s: float = 3600.0
    wait_timeout_s: float = 3600.0
    evaluate_every: int = 1
    fewest_uploads: int = 1
    client_ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("clients_per_round", "min_clients", "min_replies", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.clients_per_round and self.min_replies and self.min_replies > self.clients_per_round:
            raise ValueError(f"--min-replies is {self.min_replies}, more than the {self.clients_per_round} clients "
                             "that are asked in a round; lower --min-replies or raise --clients-per-round")

    def rounds_within(self, plan_rounds: int, max_participations: int) -> int:
        """Return how many of the plan's rounds `min_clients` clients can close if each answers every order.

        Whoever is asked has taken part, whether or not the round needed its upload.

        Args:
            plan_rounds: number of rounds in the plan.
            max_participations: how many rounds each client may take part in.
        """
        cohort = min(self.clients_per_round or self.min_clients, self.min_clients)
        needed = max(self.min_replies or -(-cohort // 2), self.fewest_uploads)
        if needed > self.min_clients:
            return 0
        full, left = divmod(max_participations * self.min_clients, cohort)
        return min(plan_rounds, full + (left >= needed))


class OpenRound:
    """One round from its first order to its last upload.

    Args:
        engine: sends orders and stores uploads.
        strategy: makes the messages.
        clients: which clients may be asked.
        number: the round's number.
        options: how rounds are run.
        observer: told what happens.
        stop: ends the round when it is set.
    """

    def __init__(self, engine: Engine, strategy: FederatedLoRA, clients: Clients, number: int, options: RoundOptions,
                 observer: Observer, stop: Event) -> None:
        self._engine, self._strategy, self._clients, self._number = engine, strategy, clients, number
        self._options, self._observer, self._stop = options, observer, stop
        self._asks: Counter[int] = Counter()  # node → how often it was asked
        self._open: dict[str, int] = {}  # message id of an open order → node
        self._uploads: dict[int, str] = {}  # node → message id
        self._told: dict[str, str] = {}  # message id → the outcome that the observer knows
        self._lost: set[int] = set()
        self._late: set[int] = set()
        self._until: dict[int, float] = {}  # attempt → its deadline
        self._orders: dict[str, int] = {}  # message id → attempt
        self._alone_since: float | None = None
        self._backups_asked, self._backups_from = 0, -math.inf
        self._looked_at, self._told_held_up = time.monotonic(), False
        self._refusals: dict[str, Refusal] = {}
        self._attempts = list(clients.asked_before(number))
        self._awaited = {name: attempt for attempt, names in enumerate(self._attempts) for name in names}

    @property
    def attempts(self) -> int:
        """How many times clients were asked in this round."""
        return len(self._attempts)

    @property
    def cohort(self) -> tuple[str, ...]:
        """Names of all clients asked, backup clients last."""
        return tuple(self._engine.name_of(node) for node in self._asks)

    @property
    def uploaded(self) -> tuple[str, ...]:
        """Names of the clients whose uploads arrived in time."""
        return tuple(sorted(self._engine.name_of(node) for node in self._uploads))

    @property
    def refused(self) -> dict[str, str]:
        """The refusal code of each client that declined, by name."""
        return {name: refusal.code for name, refusal in self._refusals.items()}

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the clients that are gone or did not answer in time."""
        return tuple(sorted(self._engine.name_of(node) for node in self._lost | self._late))

    def collect(self, arrays: ArrayRecord) -> Replies:
        """Ask clients until enough have uploaded, and return the replies in order of node id.

        Args:
            arrays: the state to train from.

        Raises:
            Ended: the run was stopped, or too few clients were there for `wait_timeout_s`. Open orders are not
                cancelled: clients finish their training and keep the upload, because the run may be resumed.
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
        """Number of uploads that the round tries to reach by asking backup clients."""
        if time.monotonic() >= min(self._until.values(), default=math.inf):
            return self._needed
        return max(self._options.min_replies or -(-len(self._attempts[0]) // 2), self._options.fewest_uploads)

    @property
    def _needed(self) -> int:
        """Number of uploads without which the round does not close."""
        if self._options.min_replies:
            return self._options.min_replies
        left = set(self._attempts[0]) - set(self.lost) - self._refusals.keys() - self._awaited.keys()
        return max(1, -(-len(left) // 2), self._options.fewest_uploads)

    def _give_up_the_late(self) -> None:
        """Tell clients whose time is up to stop, and count them as lost. What they still send is too late."""
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
        """Ask a cohort, or await the return of the clients that an earlier server asked in this round."""
        if self._awaited:
            self._await_return()
            return
        present = self._clients.wait_for(1, self._options.wait_timeout_s, self._stop, self._observer)
        self._clients.tell_if_fewer(self._number, self._options.min_clients, self._observer)
        quorum = max(self._options.min_replies or -(-(self._options.clients_per_round or 1) // 2),
                     self._options.fewest_uploads)
        present = self._clients.in_time(self._number, present, quorum)
        self._ask(self._clients.draw(self._number, present, self._options.clients_per_round), arrays)

    def _listen(self, arrays: ArrayRecord) -> None:
        """Take the next answers. Ask clients that have returned, and those that lack frozen tensors, again at once."""
        if self._stop.is_set():
            raise Ended("stopped")
        outcomes = self._engine.wait(list(self._open), POLL_S)
        self._stand_still()
        self._ask_again(arrays)  # returned clients are asked before backup clients
        if forgetful := self._take_note(outcomes):
            self._ask(forgetful, arrays)

    def _stand_still(self) -> None:
        """Stop the clients' clocks while this machine cannot store uploads, and tell the observer."""
        before, self._looked_at = self._looked_at, time.monotonic()
        if not (reason := self._engine.held_up):
            return
        self._until = {attempt: until + self._looked_at - before for attempt, until in self._until.items()}
        if not self._told_held_up:
            self._told_held_up = True
            self._observer.held_up(held_up(reason))

    def _is_enough(self) -> bool:
        """Return whether the round closes with the uploads it has, now that no client trains and none is left to ask.

        It waits up to `RETURN_S` seconds for lost clients to return.

        Raises:
            Ended: there have been too few uploads for `wait_timeout_s`.
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
        """Return why clients did not upload: the most common reasons, each with the clients' names."""
        by_reason: dict[str, list[str]] = {}
        for name, refusal in sorted(self._refusals.items()):
            by_reason.setdefault(f"declined: {refusal}", []).append(name)
        if self.lost:
            by_reason["lost"] = list(self.lost)
        most = sorted(by_reason.items(), key=lambda item: -len(item[1]))[:MOST_REASONS]
        told = "; ".join(f"{named(names)} {reason}" for reason, names in most)
        return told and f"round {self._number}: {told}"

    def _backups(self, count: int) -> list[int]:
        """Return up to `count` idle clients that can replace others. Those not yet asked in this round come first."""
        if self._backups_asked == BACKUPS_PER_ROUND:
            return []
        busy = {*self._open.values(), *self._uploads, *self._late}
        free = [n for n in self._clients.eligible() if n not in busy and self._asks[n] < ASKS_PER_ROUND
                and self._engine.name_of(n) not in self._awaited]  # these are asked for the attempt they trained for
        drawn = self._clients.draw(self._number, free, None)
        return sorted(drawn, key=lambda node: self._asks[node])[:count]

    def _await_return(self) -> None:
        """Wait up to `RETURN_S` seconds until the clients that an earlier server asked in this round are back."""
        deadline = time.monotonic() + RETURN_S
        while self._awaited.keys() - map(self._engine.name_of, self._engine.idle()) and time.monotonic() < deadline:
            if self._stop.is_set():
                raise Ended("stopped")
            self._engine.wait((), POLL_S)

    def _ask_again(self, arrays: ArrayRecord) -> None:
        """Ask clients of an earlier server that have returned, for the same attempt as that server did.

        A client that has trained for it sends the upload that it stored, so no client trains twice.
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
        """Ask backup clients, unless the last ones were asked too recently (`BACKUPS_AT_ONCE`)."""
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
        if self._options.client_ranks and self._number:  # round 0 trains no adapter
            config["ranks"] = [self._options.client_ranks.get(self._engine.name_of(node), MOST_RANK) for node in nodes]
        messages = self._strategy.configure_train(self._number, arrays, config, self._engine)
        names = tuple(sorted(self._engine.name_of(node) for node in nodes))
        self._observer.asked(self._number, attempt, names)
        for node, message_id in zip(nodes, self._engine.push_messages(messages), strict=True):
            self._open[message_id], self._orders[message_id] = node, attempt
            self._asks[node] += 1

    def _take_note(self, outcomes: Mapping[str, Outcome]) -> list[int]:
        """Record the answers, and return the nodes to which the frozen tensors must be sent again."""
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
