"""Which clients may be asked, and who of them is: cohorts, and the wait for clients."""

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
"""How soon a stop is noticed while nothing else happens."""

RETURN_S = 15.0
"""How long a server that takes up a run waits for the clients of the earlier one; living ones take seconds."""


class Ended(Exception):
    """The run ends before its last round.

    Attributes:
        reason: "stopped" or "wait-timeout".
        why: what became of those that were asked, for whoever gave the command; "" for nothing to say.
    """

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason)
        self.reason, self.why = reason, why


class Clients:
    """Which clients may be asked: none more often than the plan's `max_participations`, none that declined for good.

    Args:
        seed: of the cohorts.
        keep: is given what must be known to take the run up again, before anybody is asked.
        left: what an earlier server of this run kept last.
    """

    def __init__(self, engine: Engine, plan: RunPlan, seed: int, *, keep: Callable[[Asked], None] = lambda asked: None,
                 left: Asked | None = None) -> None:
        self._engine, self._plan, self._seed, self._keep = engine, plan, seed, keep
        self._left = left
        known = left if left is not None and left.round else Asked(0)  # a private start counts beside the rounds
        self.participations = Counter({node_id(name): times for name, times in known.participations.items()})
        self.declined = {node_id(name) for name in known.declined}
        self._names = {node_id(name): name for name in (*known.participations, *known.declined)}
        self._connected = 0
        self._missed = {node_id(name): misses for name, misses in known.missed.items()}
        self._names |= {node_id(name): name for name in known.missed}

    def eligible(self) -> list[int]:
        """Idle clients that may be asked."""
        return [node for node in self._engine.idle()
                if node not in self.declined and self.participations[node] < self._plan.max_participations]

    def asked_before(self, round: int) -> tuple[tuple[str, ...], ...]:
        """Whom an earlier server asked in this round, attempt by attempt."""
        return self._left.attempts if self._left is not None and self._left.round == round else ()

    def remember(self, round: int, attempts: Iterable[tuple[str, ...]]) -> None:
        """Keep whom the round asks, right before it does."""
        self._keep(Asked(round, tuple(attempts), {self._name(node): n for node, n in self.participations.items()},
                         tuple(map(self._name, self.declined)),
                         {self._name(node): misses for node, misses in self._missed.items()}))

    def _name(self, node: int) -> str:
        return self._names.get(node) or self._engine.name_of(node)

    def missed(self, round: int, nodes: Iterable[int]) -> None:
        """They did not answer in time. After m such rounds in a row a client is left out of the next 2^m − 1 cohorts:
        those that never answer cannot make every round last as long as it may.
        """
        for node in nodes:
            times = self._missed.get(node, (0, 0))[0] + 1
            self._missed[node] = times, round + 2**min(times, 30)

    def came_in_time(self, nodes: Iterable[int]) -> None:
        """They answered: what they missed before is forgotten."""
        for node in nodes:
            self._missed.pop(node, None)

    def in_time(self, round: int, nodes: Iterable[int], least: int) -> list[int]:
        """Those of the nodes whose turn it is after what they missed; where these are fewer than `least`, as many more
        as are lacking, those first whose turn comes soonest.
        """
        nodes = list(nodes)
        waiting = sorted((self._missed[node][1], node) for node in nodes if self._missed.get(node, (0, 0))[1] > round)
        left_out = {node for _, node in waiting[max(0, least - (len(nodes) - len(waiting))):]}
        return [node for node in nodes if node not in left_out]

    def draw(self, round: int, nodes: Iterable[int], size: int | None) -> list[int]:
        """A cohort of at most `size` of the nodes: those with the fewest participations, ties by SHA-256.

        Balanced, because privacy is calibrated to the most participations that any client can have: with stable
        membership nobody takes part more often than ⌈rounds · size / clients⌉ times. It depends on the seed, the round
        and the names alone, so that simulation and deployment draw the same, and compared methods too.
        """

        def key(node: int) -> tuple[int, bytes]:
            text = f"{self._seed}/{round}/{self._engine.name_of(node)}"
            return self.participations[node], hashlib.sha256(text.encode()).digest()

        return sorted(nodes, key=key)[:size]

    def wait_for(self, needed: int, timeout_s: float | None, stop: Event, observer: Observer, *,
                 to_begin: bool = False) -> list[int]:
        """Block until `needed` clients are eligible, or `to_begin` merely there, and return all that are.

        Raises:
            Ended: stopped, or `timeout_s` passed; `to_begin` whoever is there by then is enough.
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
        """Say, once, that fewer clients are connected than the run waited for."""
        before, self._connected = self._connected, len(list(self._engine.get_node_ids()))
        if self._connected < needed and self._connected != before:
            observer.fewer(round, self._connected, needed)
