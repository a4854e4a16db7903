"""A check of every simulation: no two streams of random numbers are one, whichever clients and rounds they are of.

Two clients with the same noise cancel it for whoever subtracts their uploads, and two that sample alike are one client
twice. A simulation sees all streams of a process, so it can compare what a deployment cannot. With --workers
each compares those that it draws from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.privacy import RandomStream, RunStreams


@dataclass(frozen=True)
class ComparedStreams(RunStreams):
    """The streams of one simulated client.

    Attributes:
        run: a name of this simulation that no other has; all of its clients' streams in this process are compared.
    """

    run: str = ""

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        whose = f"{purpose} of {self.name!r} in round {round}, attempt {attempt}"
        return _Compared(super().stream(round, purpose, attempt), whose, _seen(self.run))


_SEEN: dict[str, dict[float, str]] = {}
"""Run under way → what each of its streams began with, whose it is. Of a process, as workers are given one client at a
time."""


def _seen(run: str) -> dict[float, str]:
    if run not in _SEEN:
        _SEEN.clear()
    return _SEEN.setdefault(run, {})


class _Compared(RandomStream):
    """Passes another stream on, and compares the first number that is really drawn with those of all others.

    By chance two of n streams begin with the same of 2^53 values once in 2^54 / n^2 runs.
    """

    def __init__(self, stream: RandomStream, whose: str, seen: dict[float, str]) -> None:
        self._stream, self._whose, self._seen = stream, whose, seen

    def uniform(self, count: int) -> np.ndarray:
        values = self._stream.uniform(count)
        if count and self._whose:
            other = self._seen.setdefault(float(values[0]), self._whose)
            if other is not self._whose:
                raise RuntimeError(f"the {self._whose} repeats the {other}: their random numbers are the same, so "
                                   "neither hides anything. Please report this with the command; the run is void")
            self._whose = ""
        return values
