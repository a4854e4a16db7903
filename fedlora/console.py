"""Console messages on stderr, written by a thread of their own so that a slow reader never blocks a command."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from typing_extensions import override

from fedlora.json_lines import JsonConsole, JsonHandler, JsonLines, JsonText, line

MOST_WAITING = 1 << 20
"""Most characters that wait to be written. Lines that come when the queue is full are counted and dropped."""
REST_OF_LINE = 1 << 16
"""Most characters of a line's rest that are queued or dropped like its beginning, so that no line is written in part.

If the beginning was queued, the rest may exceed the queue by this much. If it was dropped, this much of the rest is
dropped too. Longer output without a line end is not a line (a progress bar, say); each of its writes is queued or
dropped by itself."""
WIDTH_OF_FILES = 200
"""Columns for tables that are written to a file or a pipe."""
LEAVE_S = 2.0
"""Seconds that a command waits, when it ends, for its last lines to be written."""


def messages() -> Console:
    """Return a console on stderr, so that the command's output on stdout can be piped.

    Where stderr is not a terminal, lines are not wrapped: each message in a log file is one line, however long. Where
    stderr takes JSON lines, each message is one.
    """
    if isinstance(sys.stderr, JsonText):
        return JsonConsole(sys.stderr.lines)
    console = Console(stderr=True, markup=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def results(*, markup: bool = True) -> Console:
    """Return a console on stdout for a command's results, where a table is never cut off in a file or a pipe.

    Args:
        markup: whether texts hold rich's markup; otherwise every character stands for itself.
    """
    console = Console(highlight=False, markup=markup, emoji=markup)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_OF_FILES)
    return console


def tell(console: Console, message: str, event: str = "message", level: str = "info", *, style: str | None = None,
         **fields: object) -> None:
    """Print a message without wrapping it; where stderr takes JSON lines, with what it is about.

    Args:
        console: one of `messages`.
        message: what is printed.
        event: what happened, in a word (`fedlora.json_lines`).
        level: as in `logging`, in lower case.
        style: how it looks on a terminal.
        **fields: values of other `fedlora.json_lines.FIELDS`.
    """
    if isinstance(console, JsonConsole):
        console.lines.write(event, message, level, **fields)
    else:
        console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)


def tell_about(console: Console, **fields: str) -> None:
    """Have every later JSON line say which run or client it is about. Without JSON lines, do nothing."""
    if isinstance(console, JsonConsole):
        console.lines.about |= fields


def say_why(message: str) -> None:
    """Write the reason why a command ends to stderr."""
    if isinstance(sys.stderr, JsonText):
        sys.stderr.lines.write("error", message, "error")
    else:
        print(message, file=sys.stderr)


def log_to_stderr() -> None:
    """Have warnings and errors that are logged written to stderr, as text or JSON lines as stderr takes them."""
    if isinstance(sys.stderr, JsonText):
        logging.basicConfig(level=logging.WARNING, handlers=[JsonHandler(sys.stderr.lines)])
        logging.captureWarnings(True)
    else:
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


@contextmanager
def stderr_that_never_blocks(log_format: str = "text") -> Iterator[None]:
    """Let a thread write this process's stderr, so that writing to it returns at once.

    A pipe that nobody reads, or a paused terminal, then stops neither a round nor a signal handler. Lines that do not
    fit into the queue are dropped, and a message says how many.

    Args:
        log_format: "text", or "json" to have all that is written become JSON lines (`fedlora.json_lines`).
    """
    before = sys.stderr
    as_json = log_format == "json"
    lines = QueuedLines(before, (lambda told: line("stderr", told, "warning")) if as_json else "{}\n".format)
    sys.stderr = JsonText(JsonLines(lines)) if as_json else lines
    try:
        yield
    finally:
        sys.stderr = before
        lines.end(LEAVE_S)


class QueuedLines(io.TextIOBase):
    """A text stream whose `write` returns at once and leaves the writing to a thread.

    Args:
        target: the stream that the text is written to. If it has a file descriptor, that is written to directly, so
            that no lock of the stream is held.
        as_line: makes the line that says how many lines were dropped from its text.
    """

    def __init__(self, target: TextIO, as_line: Callable[[str], str] = "{}\n".format) -> None:
        self._target, self._as_line = target, as_line
        try:
            self._descriptor: int | None = target.fileno()
        except (OSError, AttributeError, ValueError):
            self._descriptor = None
        self._waiting: deque[str] = deque()
        self._characters = self._dropped = self._skipped = 0
        self._changed = threading.Condition()  # re-entrant: a signal handler may write in the middle of a write
        self._at_line_start, self._ended = True, False
        self._thread = threading.Thread(target=self._forward, name="fedlora-stderr", daemon=True)
        self._thread.start()

    @property
    @override
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._target, "encoding", None) or "utf-8"

    @override
    def fileno(self) -> int:
        return self._target.fileno()

    @override
    def isatty(self) -> bool:
        return self._target.isatty()

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, text: str) -> int:
        """Queue the text, or drop it if the queue is full, and return its length."""
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

    @override
    def flush(self) -> None:
        """Do nothing: a writer never waits for the text to reach the target."""

    def end(self, timeout_s: float) -> None:
        """Accept no more text, and wait until the rest is written, for at most `timeout_s` seconds."""
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
                pass  # stderr itself is gone, so the error cannot be reported

    def _next(self) -> str | None:
        """Wait for text and return all that is queued; None once the stream has ended and the queue is empty."""
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
            text += self._as_line(f"({dropped:,} lines were left out because nothing read this output)")
        return text
