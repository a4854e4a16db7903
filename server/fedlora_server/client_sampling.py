"""Choice of clients to train: who may be asked, who forms a round's cohort, and the wait until enough are there."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from threading import Event

from fedlora.plan import RunPlan

from .checkpoint import Asked
from .engine import Engine, node_id
from .observer import Observer

POLL_S = 0.25
"""Seconds within which a stop is noticed while nothing else happens."""

RETURN_S = 15.0
"""Seconds for which a resumed run waits for its clients to return. Clients that are alive take a few."""


class Ended(Exception):
    """Raised if the run ends before its last round.

    Attributes:
        reason: "stopped" or "wait-timeout".
        why: what happened to the clients that were asked, for the coordinator to read; may be "".
    """

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason)
        self.reason, self.why = reason, why


class Clients:
    """The clients of a run, how often each was asked, and which did not answer in time.

    No client is asked more often than the plan's `max_participations`, and none that declined for good.

    Args:
        engine: where the clients are.
        plan: the run's plan.
        seed: decides the cohorts, together with the round and the names.
        keep: called before clients are asked, with all that a server needs to resume the run.
        left: what an earlier server of this run gave to `keep` last.

    Attributes:
        participations: node id → how often the client was asked in rounds.
        declined: node ids of clients that declined for good.
    """

    def __init__(self, engine: Engine, plan: RunPlan, seed: int, *, keep: Callable[[Asked], None] = lambda asked: None,
                 left: Asked | None = None) -> None:
        self._engine, self._plan, self._seed, self._keep = engine, plan, seed, keep
        self._left = left
        known = left if left is not None and left.round else Asked(0)  # a private start does not count as a round
        self.participations = Counter({node_id(name): times for name, times in known.participations.items()})
        self.declined = {node_id(name) for name in known.declined}
        self._names = {node_id(name): name for name in (*known.participations, *known.declined)}
        self._connected = 0
        self._missed = {node_id(name): misses for name, misses in known.missed.items()}
        self._names |= {node_id(name): name for name in known.missed}

    def eligible(self) -> list[int]:
        """Return the node ids of idle clients that may be asked."""
        return [node for node in self._engine.idle()
                if node not in self.declined and self.participations[node] < self._plan.max_participations]

    def asked_before(self, round: int) -> tuple[tuple[str, ...], ...]:
        """Return the names of clients that an earlier server asked in this round, one tuple for each attempt."""
        return self._left.attempts if self._left is not None and self._left.round == round else ()

    def remember(self, round: int, attempts: Iterable[tuple[str, ...]]) -> None:
        """Store which clients the round asks, just before it asks them.

        Args:
            round: the round's number.
            attempts: the names of the clients asked, one tuple for each attempt so far.
        """
        attempts = tuple(attempts)
        self._names |= {node_id(name): name for names in attempts for name in names}
        self._keep(Asked(round, attempts, {self._name(node): n for node, n in self.participations.items()},
                         tuple(map(self._name, self.declined)),
                         {self._name(node): misses for node, misses in self._missed.items()}))

    def _name(self, node: int) -> str:
        return self._names.get(node) or self._engine.name_of(node)

    def missed(self, round: int, nodes: Iterable[int]) -> None:
        """Record that these clients did not answer in time.

        After m such rounds in a row, a client is left out of the next 2^m − 1 cohorts. So clients that never answer
        cannot make every round last until its timeout.
        """
        for node in nodes:
            times = self._missed.get(node, (0, 0))[0] + 1
            self._missed[node] = times, round + 2**min(times, 30)

    def came_in_time(self, nodes: Iterable[int]) -> None:
        """Record that these clients answered, which clears what `missed` recorded."""
        for node in nodes:
            self._missed.pop(node, None)

    def in_time(self, round: int, nodes: Iterable[int], least: int) -> list[int]:
        """Return the nodes that may be asked in this round: all but those left out for rounds that they missed.

        If fewer than `least` remain, left-out nodes are added until there are that many, beginning with those that are
        due soonest.

        Args:
            round: the round's number.
            nodes: candidates for its cohort.
            least: how many nodes to return at least, if there are that many.
        """
        nodes = list(nodes)
        waiting = sorted((self._missed[node][1], node) for node in nodes if self._missed.get(node, (0, 0))[1] > round)
        left_out = {node for _, node in waiting[max(0, least - (len(nodes) - len(waiting))):]}
        return [node for node in nodes if node not in left_out]

    def draw(self, round: int, nodes: Iterable[int], size: int | None) -> list[int]:
        """Return a cohort of at most `size` nodes (None for all): those asked least often, in an order set by SHA-256.

        The draw is balanced because noise is calibrated to the largest number of participations that a client can have:
        while the same clients are there, none takes part more than ⌈rounds · size / clients⌉ times. The order depends
        only on the seed, the round and the names, so a simulation and a deployment draw the same cohorts, and so do
        the methods that are compared with each other.
        """

        def key(node: int) -> tuple[int, bytes]:
            text = f"{self._seed}/{round}/{self._engine.name_of(node)}"
            return self.participations[node], hashlib.sha256(text.encode()).digest()

        return sorted(nodes, key=key)[:size]

    def wait_for(self, needed: int, timeout_s: float | None, stop: Event, observer: Observer, *,
                 to_begin: bool = False) -> list[int]:
        """Wait until enough clients are eligible, and return the node ids of all that are.

        Args:
            needed: how many are enough.
            timeout_s: seconds to wait at most; None for no limit.
            stop: ends the wait when it is set.
            observer: told how many are missing.
            to_begin: count every client that is connected and ready, and at the timeout go on with those there are.

        Raises:
            Ended: the run was stopped, or the timeout passed (not with `to_begin`).
        """
        since, told = time.monotonic(), -1
        while len(present := list(self._engine.get_node_ids()) if to_begin else self.eligible()) < needed:
            if stop.is_set():
                raise Ended("stopped")
            if timeout_s is not None and time.monotonic() - since >= timeout_s:
                if to_begin:
                    break
                raise Ended("wait-timeout")
            if told != len(present):
                told = len(present)
                observer.waiting(needed, told, timeout_s)
            self._engine.wait((), POLL_S)
        return present

    def tell_if_fewer(self, round: int, needed: int, observer: Observer) -> None:
        """Tell the observer if fewer clients are connected than `needed`, once for each such number of clients."""
        before, self._connected = self._connected, len(list(self._engine.get_node_ids()))
        if self._connected < needed and self._connected != before:
            observer.fewer(round, self._connected, needed)
