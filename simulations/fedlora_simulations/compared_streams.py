"""A check in every simulation that no two streams of random numbers are the same, over all clients and rounds.

If two clients had the same noise, whoever subtracts their uploads would cancel it; two clients that draw the same
records are one client counted twice. A simulation sees all streams of its process, so it can compare them, which a
deployment cannot. With --workers, each worker compares the streams that it draws from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedlora.privacy import RandomStream, RunStreams


@dataclass(frozen=True)
class ComparedStreams(RunStreams):
    """The streams of one simulated client, which are compared with those of all clients of the same run.

    Attributes:
        run: unique name of the simulated run.
    """

    run: str = ""

    @override
    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        whose = f"{purpose} of {self.name!r} in round {round}, attempt {attempt}"
        return _Compared(super().stream(round, purpose, attempt), whose, _seen(self.run))


_SEEN: dict[str, dict[float, str]] = {}
"""The present run → first number of each stream → whose stream it is.

It is kept per process, because a worker is given one client at a time."""


def _seen(run: str) -> dict[float, str]:
    if run not in _SEEN:
        _SEEN.clear()
    return _SEEN.setdefault(run, {})


class _Compared(RandomStream):
    """A stream that returns the numbers of another one, and compares the first of them with those of all others.

    By chance, two of n streams begin with the same one of 2^53 values once in 2^54 / n^2 runs.
    """

    def __init__(self, stream: RandomStream, whose: str, seen: dict[float, str]) -> None:
        self._stream, self._whose, self._seen = stream, whose, seen

    @override
    def uniform(self, count: int) -> np.ndarray:
        values = self._stream.uniform(count)
        if count and self._whose:
            other = self._seen.setdefault(float(values[0]), self._whose)
            if other is not self._whose:
                raise RuntimeError(f"the {self._whose} repeats the {other}: their random numbers are the same, so "
                                   "neither hides anything. Please report this with the command; the run is void")
            self._whose = ""
        return values
