"""What people are told while a command runs, by a thread that alone waits for whoever reads it."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

MOST_WAITING = 1 << 20
"""Characters that wait for a reader; what comes after them is counted and dropped."""
REST_OF_LINE = 1 << 16
"""How many more may wait, or are dropped, so that a line is whole or not there. What comes after more without an end is
no line but what moves about on a terminal; of that, whole writes are dropped."""
LEAVE_S = 2.0
"""How long a command that ends waits for the last of its lines to be read."""


def messages() -> Console:
    """On stderr, so that a command's output can be piped; a message in a file is one line, however long."""
    console = Console(stderr=True, markup=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


@contextmanager
def stderr_that_never_blocks() -> Iterator[None]:
    """Have this process' stderr written by a thread, so that a pipe that nobody reads, or a terminal that is held,
    stops neither a round nor a signal's handler. What a full queue has no room for is dropped, and that is said.
    """
    before = sys.stderr
    lines = QueuedLines(before)
    sys.stderr = lines
    try:
        yield
    finally:
        sys.stderr = before
        lines.end(LEAVE_S)


class QueuedLines(io.TextIOBase):
    """A text stream whose `write` returns at once.

    Args:
        target: where the text goes in the end; by its descriptor where it has one, so that no lock of its own is held.
    """

    def __init__(self, target: TextIO) -> None:
        self._target = target
        try:
            self._descriptor: int | None = target.fileno()
        except (OSError, AttributeError, ValueError):
            self._descriptor = None
        self._waiting: deque[str] = deque()
        self._characters = self._dropped = self._skipped = 0
        self._changed = threading.Condition()  # re-entrant: a signal's handler may write amid a write
        self._at_line_start, self._ended = True, False
        self._thread = threading.Thread(target=self._forward, name="fedlora-stderr", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._target, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        return self._target.fileno()

    def isatty(self) -> bool:
        return self._target.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._changed:
            most = MOST_WAITING if self._at_line_start else MOST_WAITING + REST_OF_LINE
            in_skipped_line = 0 < self._skipped < REST_OF_LINE
            if self._ended or in_skipped_line or self._characters + len(text) > most:
                self._dropped += text.count("\n")
                self._skipped = self._skipped + len(text) if self._at_line_start and not text.endswith("\n") else 0
            elif text:
                self._skipped = 0
                self._waiting.append(text)
                self._characters += len(text)
                self._at_line_start = text.endswith("\n")
                self._changed.notify()
        return len(text)

    def flush(self) -> None:
        """Nothing: whoever writes does not wait."""

    def end(self, timeout_s: float) -> None:
        """Take no more, and wait until all is written, but not for longer than that."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _forward(self) -> None:
        while (text := self._next()) is not None:
            try:
                if self._descriptor is None:
                    self._target.write(text)
                    self._target.flush()
                    continue
                data = text.encode(self.encoding, "backslashreplace")
                while data:
                    data = data[os.write(self._descriptor, data):]
            except (OSError, ValueError):
                pass  # nobody is there to be told

    def _next(self) -> str | None:
        """What is to be written, once there is something; None at the end."""
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            if not self._waiting:
                return None
            text = "".join(self._waiting)
            dropped, self._dropped = self._dropped, 0
            self._waiting.clear()
            self._characters = 0
        if dropped:
            text += "" if text.endswith("\n") else "\n"
            text += f"({dropped:,} lines were left out, for nobody read this)\n"
        return text
