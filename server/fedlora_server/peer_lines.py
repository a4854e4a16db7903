"""A limit on log lines about peers: one a minute for each peer and kind of line.

A peer decides how often it joins, breaks the protocol or declines. It must not decide how long the log becomes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from typing_extensions import override

MINUTE_S = 60.0
MOST_PEERS = 4096
"""Number of (peer, kind) pairs that are remembered. Those that were logged longest ago are forgotten first."""
MOST_OF_A_KIND = 200
"""Number of lines of one kind in a minute, for all peers together, since a peer can make up names for free."""


class PeerLines:
    """A limiter that decides which lines about peers are logged. Any number of threads may use it.

    Args:
        clock: returns monotonic seconds.
        most_of_a_kind: largest number of lines of one kind in a minute, for all peers together; None for no limit, as
            for peers that cannot make up names.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic,
                 most_of_a_kind: int | None = MOST_OF_A_KIND) -> None:
        self._clock, self._most_of_a_kind = clock, math.inf if most_of_a_kind is None else most_of_a_kind
        self._lock = threading.Lock()
        self._said: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._unsaid: Counter[tuple[str, str]] = Counter()
        self._minutes: dict[str, tuple[float, int, int]] = {}  # kind → (minute's start, lines logged, lines left out)

    def admit(self, peer: str, kind: str) -> str | None:
        """Decide about one line.

        Args:
            peer: whom the line is about: a client's name or address.
            kind: what it says, in a word.

        Returns:
            None if the line must not be logged; else a text to append to it, which counts the lines left out before.
        """
        now, key = self._clock(), (peer, kind)
        with self._lock:
            if now - self._said.get(key, -MINUTE_S) < MINUTE_S:
                self._unsaid[key] += 1
                return None
            since, said, others = self._minutes.get(kind, (now, 0, 0))
            if now - since >= MINUTE_S:
                since, said = now, 0
            if said >= self._most_of_a_kind:
                self._minutes[kind] = since, said, others + 1
                return None
            self._minutes[kind] = since, said + 1, 0
            self._said[key] = now
            self._said.move_to_end(key)
            if len(self._said) > MOST_PEERS:
                self._unsaid.pop(self._said.popitem(last=False)[0], None)
            unsaid = self._unsaid.pop(key, 0)
        more = [f"{unsaid:,} more like it since the last such line"] * bool(unsaid)
        more += [f"{others:,} such lines about others were left out"] * bool(others)
        return f" ({'; '.join(more)})" if more else ""


class PeerFilter(logging.Filter):
    """A log handler's filter. `PeerLines` decides about records that have `peer` and `kind` in their `extra`."""

    def __init__(self, lines: PeerLines) -> None:
        super().__init__()
        self._lines = lines

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        peer = getattr(record, "peer", None)
        if peer is None:
            return True
        more = self._lines.admit(peer, record.kind)  # type: ignore[attr-defined]
        if more:
            record.msg, record.args = f"{record.getMessage()}{more}", ()
        return more is not None
