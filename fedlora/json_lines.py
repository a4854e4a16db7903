"""A command's stderr as JSON lines (--log-format json): every line is one object with the same fields.

    time      UTC, to the millisecond
    level     debug, info, warning, error or critical
    event     what happened, in a word: at the server news of clients (`joined`, `uploaded`, `refused`, …) and of rounds
              (`asked`, `finished`, …); at a client `joined`, `training`, `round` and `sum` (a secure sum); at both
              `error` (the reason why the command ends), `log` (a warning), `message` (any other text) and `stderr`
              (a library's output)
    message   the same text as without the option
    run       the run's id, once there is one
    round     the round's number
    attempt   the attempt of an order
    client    the client that the line is about
    code      a refusal's code, or how a run ended
    peer      address of a client's end of the connection
    bytes     size of an upload

A field that says nothing is null. No line holds more of a record than without the option: nothing.
"""

from __future__ import annotations

import io
import json
import logging
import threading
from datetime import UTC, datetime
from typing import Any, TextIO, cast

from rich.console import Console
from typing_extensions import override

FIELDS = ("time", "level", "event", "message", "run", "round", "attempt", "client", "code", "peer", "bytes")
"""The fields of every line, in their order."""
LONGEST_LINE = 1 << 16
"""Number of characters after which text without a line end becomes a line."""
WIDTH = 120
"""Columns in which tables and panels are drawn."""


class JsonLines:
    """A writer of JSON lines. Any number of threads may use it.

    Args:
        target: the stream that the lines are written to, each by one call.

    Attributes:
        about: field → value, for fields that a line has if it names none: the run, and at a client its name.
    """

    def __init__(self, target: io.TextIOBase) -> None:
        self.target = target
        self.about: dict[str, object] = {}

    def write(self, event: str, message: str, level: str = "info", **fields: object) -> None:
        """Write a line.

        Args:
            event: what happened, in a word.
            message: the same in words.
            level: as in `logging`, in lower case.
            **fields: values of the other `FIELDS`.
        """
        self.target.write(line(event, message, level, **self.about | fields))


def time_now() -> str:
    """Return the time in UTC, to the millisecond: 2026-11-28T14:02:11.532Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line(event: str, message: str, level: str = "info", **fields: object) -> str:
    """Return a line with its end; see `JsonLines.write`.

    Raises:
        TypeError: a field is none of `FIELDS`.
    """
    if unknown := fields.keys() - set(FIELDS):
        raise TypeError(f"a line has no field {', '.join(sorted(unknown))}")
    values = dict.fromkeys(FIELDS) | fields | {"time": time_now(), "level": level, "event": event, "message": message}
    return json.dumps({name: None if value == "" else value for name, value in values.items()}) + "\n"


class JsonText(io.TextIOBase):
    """A stand-in for stderr: each line that is written to it becomes the message of a JSON line.

    Args:
        lines: where they go.
    """

    def __init__(self, lines: JsonLines) -> None:
        self.lines = lines
        self._begun = threading.local()  # each thread's line without an end

    @property
    @override
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @override
    def fileno(self) -> int:
        return self.lines.target.fileno()

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, text: str) -> int:
        *whole, rest = (getattr(self._begun, "text", "") + text).replace("\r", "\n").split("\n")
        if len(rest) > LONGEST_LINE:
            whole, rest = [*whole, rest], ""
        self._begun.text = rest
        for message in filter(str.strip, whole):
            self.lines.write("stderr", message, "warning")
        return len(text)

    @override
    def flush(self) -> None:
        """Do nothing: a line is written when it ends."""


class JsonConsole(Console):
    """A console whose every `print` is one JSON line. It is no terminal, so that nothing is redrawn or asked.

    Args:
        lines: where they go.
    """

    def __init__(self, lines: JsonLines) -> None:
        super().__init__(file=cast(TextIO, JsonText(lines)), force_terminal=False, width=WIDTH)
        self.lines = lines

    @override
    def print(self, *objects: Any, style: Any = None, **how: Any) -> None:
        drawn = Console(file=io.StringIO(), force_terminal=False, color_system=None, width=WIDTH, markup=False,
                        highlight=False, soft_wrap=True)
        drawn.print(*objects, **how)
        message = drawn.file.getvalue().strip("\n")  # type: ignore[attr-defined]
        if message:
            self.lines.write("message", message, "warning" if style else "info")


class JsonHandler(logging.Handler):
    """A handler that writes log records as JSON lines, with the peer that `extra` names.

    Args:
        lines: where they go.
    """

    def __init__(self, lines: JsonLines) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._lines = lines

    @override
    def emit(self, record: logging.LogRecord) -> None:
        message, level = self.format(record).strip(), record.levelname.lower()
        self._lines.write("log", message, level, peer=getattr(record, "peer", None))
