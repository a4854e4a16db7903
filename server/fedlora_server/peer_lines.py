"""How often what a peer does is said: once a minute for each peer and kind, whatever it does.

A peer decides how often it joins, breaks the protocol or declines; it must not decide how long a log becomes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

MINUTE_S = 60.0
MOST_PEERS = 4096
"""(peer, kind) that are remembered; the longest silent are forgotten first."""
MOST_OF_A_KIND = 200
"""Lines of one kind in a minute, whoever they are about: names cost a peer nothing."""


class PeerLines:
    """Decides which lines are said.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._unsaid: Counter[tuple[str, str]] = Counter()
        self._minutes: dict[str, tuple[float, int, int]] = {}  # kind: since when, said, unsaid

    def admit(self, peer: str, kind: str) -> str | None:
        """None where a line is not to be said; else what to add to it: how many like it were not."""
        now, key = self._clock(), (peer, kind)
        with self._lock:
            if now - self._said.get(key, -MINUTE_S) < MINUTE_S:
                self._unsaid[key] += 1
                return None
            since, said, others = self._minutes.get(kind, (now, 0, 0))
            if now - since >= MINUTE_S:
                since, said = now, 0
            if said >= MOST_OF_A_KIND:
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
    """Of a log handler: lines that say in `extra` of which peer and kind they are pass as `PeerLines` decides."""

    def __init__(self, lines: PeerLines) -> None:
        super().__init__()
        self._lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        peer = getattr(record, "peer", None)
        if peer is None:
            return True
        more = self._lines.admit(peer, record.kind)  # type: ignore[attr-defined]
        if more:
            record.msg, record.args = f"{record.getMessage()}{more}", ()
        return more is not None
