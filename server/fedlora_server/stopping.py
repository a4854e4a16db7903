"""The request that a run stops: by a signal, or by `fedlora-server stop`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Stopping:
    """Whether the run is to stop, and whether it will go on later.

    Args:
        console: tells the coordinator that the run stops.
        ends_process: whether a second signal ends the process at once; otherwise it raises KeyboardInterrupt.

    Attributes:
        asked: set once the run is to stop.
        goes_on: set before `asked` if clients are to wait for the server to return.
    """

    def __init__(self, console: Console, *, ends_process: bool = True) -> None:
        self._console, self._ends_process = console, ends_process
        self.asked, self.goes_on = threading.Event(), threading.Event()

    def ask(self, *, goes_on: bool) -> bool:
        """Stop the run, unless it was asked to stop before. Any thread and any signal handler may call this.

        Args:
            goes_on: clients wait for this server to return; otherwise they are told that the run was stopped.

        Returns:
            Whether this was the first request. Only the first one counts.
        """
        if self.asked.is_set():
            return False
        if goes_on:
            self.goes_on.set()
        self.asked.set()
        self._console.print("Stopping: the last finished round is written, and clients "
                            f"{'wait for this server to return' if goes_on else 'are told'}. A second signal stops the "
                            "server at once.")
        return True

    def how(self) -> str:
        """Return "stopped", "suspended" if the run goes on later, or "" if it was not asked to stop."""
        return "" if not self.asked.is_set() else "suspended" if self.goes_on.is_set() else "stopped"

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Within the block, stop the run at SIGINT or SIGTERM instead of ending the process.

        SIGTERM lets the run go on later. A second signal stops everything at once. Only the main thread hears signals,
        so elsewhere nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: object) -> None:
            if not self.ask(goes_on=number == signal.SIGTERM):
                if not self._ends_process:
                    raise KeyboardInterrupt
                os._exit(128 + number)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
