"""Waiting until a fault of this machine passes, such as a full disk, so that no finished training is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from fedlora.files import PASSING

Result = TypeVar("Result")

TRY_AGAIN_S = 0.5
"""Seconds between two attempts to store an upload."""


def outlast(attempt: Callable[[], Result], wait: Callable[[OSError], object]) -> Result:
    """Call `attempt` until it succeeds, and return its result.

    Args:
        attempt: may raise OSError.
        wait: called after each fault that can pass, with the fault. It returns when it is time to try again, and
            raises if there is no reason to go on.

    Raises:
        OSError: a fault that does not pass by itself (`fedlora.files.PASSING`).
    """
    while True:
        try:
            return attempt()
        except OSError as fault:
            if fault.errno not in PASSING:
                raise
            wait(fault)


class Patience(Protocol):
    """A caller of functions that fail if the disk does. It decides how often to try again, and returns the result."""

    def __call__(self, attempt: Callable[[], Result]) -> Result:
        """Return what `attempt` returns; raise OSError if it is given up."""


def once(attempt: Callable[[], Result]) -> Result:
    """Call a function once: the `Patience` that never tries again."""
    return attempt()


class HeldUp:
    """The uploads that wait because this machine cannot store them for now.

    They are not refused, because a refused client would have to train for its upload again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[object, str] = {}

    @property
    def reason(self) -> str:
        """Why an upload waits; "" while none does."""
        with self._lock:
            return next(iter(self._reasons.values()), "")

    def patience(self, go_on: Callable[[OSError], None]) -> Patience:
        """Return a patience that waits until the fault has passed.

        Args:
            go_on: called before each new attempt, with the fault. It raises if nobody needs the upload any more.
        """

        def patiently(attempt: Callable[[], Result]) -> Result:
            this = object()

            def wait(fault: OSError) -> None:
                with self._lock:
                    self._reasons[this] = fault.strerror or str(fault)
                time.sleep(TRY_AGAIN_S)
                go_on(fault)

            try:
                return outlast(attempt, wait)
            finally:
                with self._lock:
                    self._reasons.pop(this, None)

        return patiently
