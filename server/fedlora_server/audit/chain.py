"""The lines of an audit log: their fields, the hashes that chain them, and what is wrong with a file that was changed.

Each line is a JSON object in one fixed spelling. Its `hash` covers all its other fields, of which `previous` is the
hash of the line before. So whoever changes a line has to write every later line anew, and the last hash (the head)
differs then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "audit.jsonl"
"""Name of the audit log in a run's folder."""

FIELDS: Mapping[str, type] = {
    "number": int, "time": str, "event": str, "client": str, "fingerprint": str, "peer": str, "round": int,
    "attempt": int, "code": str, "sha256": str, "bytes": int, "more": int, "run": str, "plan_sha256": str,
    "version": str, "previous": str, "hash": str}
"""Field → type, in the order in which a line has them. Every line has all; a field that says nothing is null.

    number         1, 2, 3, …
    time           when the event happened, in UTC
    event          opened, resumed, begun, closed, ended; a kind of `observer.ClientEvent`; or what became of an upload:
                   accepted, curbed (accepted with less weight than it claims), left-out; rostered and unopened: a
                   new roster for secure sums, and an attempt at one that ended unopened
    client         the client's name, or what a client that has not joined calls itself
    fingerprint    SHA-256 of its certificate's public key; in opened and resumed, of the server's
    peer           address of its end of the connection
    round          the round of an order; in resumed and begun, the last finished round
    attempt        the order's attempt
    code           a refusal's code; in ended, how; in left-out, rejected or unused; in resumed, torn or no-log
    sha256         digest of an upload's tensors, as in the client's own privacy report; in rostered, of the roster
    bytes          size of an upload's tensors; in resumed, how many bytes of a torn line were cut
    more           how many events were left out since the line before
    run            the run's id, in opened and resumed
    plan_sha256    digest of the plan, once its labels are fixed, in opened, resumed and begun
    version        the server's FedLoRA version, in opened and resumed
    previous       hash of the line before; zeros in the first
    hash           SHA-256 of the line without this field, as it is written
"""

NO_LINE = "0" * 64
"""Stands for the hash of the line before the first."""

Line = Mapping[str, Any]


def sealed(values: Line, number: int, previous: str) -> Line:
    """Return the line with its number, the hash of the line before and its own hash.

    Args:
        values: the other fields; those that are absent become null.
        number: its place in the log, from 1.
        previous: the hash of the line before, or `NO_LINE`.
    """
    line = {field: values.get(field) for field in FIELDS} | {"number": number, "previous": previous}
    return line | {"hash": digest(line)}


def digest(line: Line) -> str:
    """Return the hash of a line: the SHA-256 of its spelling without the field `hash`."""
    return hashlib.sha256(spelled({field: value for field, value in line.items() if field != "hash"})).hexdigest()


def spelled(line: Line) -> bytes:
    """Return the one spelling of a line: JSON in ASCII, without blanks and without a line end.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Chain:
    """The content of an audit log.

    Attributes:
        lines: the lines up to the first that is wrong.
        wrong: what is wrong with the next line; "" if nothing is.
        torn_bytes: length of a last line without an end, which a server that was killed has left. It is not in `lines`
            and not in `wrong`.
    """

    lines: tuple[Line, ...]
    wrong: str
    torn_bytes: int

    @property
    def head(self) -> str:
        """The hash of the last line; `NO_LINE` if there is none."""
        return str(self.lines[-1]["hash"]) if self.lines else NO_LINE


def read(path: Path) -> Chain:
    """Read an audit log and check its chain.

    Raises:
        OSError: the file cannot be read.
    """
    *whole, torn = path.read_bytes().split(b"\n")
    lines: list[Line] = []
    head, wrong = NO_LINE, ""
    for number, raw in enumerate(whole, start=1):
        line = _line(raw)
        if wrong := _why_wrong(line, number, head):
            break
        assert line is not None
        lines.append(line)
        head = line["hash"]
    return Chain(tuple(lines), wrong, len(torn))


def _line(raw: bytes) -> Line | None:
    """Return the line that is spelled so; None if no line is."""
    try:
        line = json.loads(raw)
        if (isinstance(line, dict) and list(line) == list(FIELDS) and spelled(line) == raw
                and all(value is None or type(value) is FIELDS[field] for field, value in line.items())):
            return line
    except (ValueError, RecursionError):
        pass
    return None


def _why_wrong(line: Line | None, number: int, head: str) -> str:
    """Return why a line cannot be the next one of a log; "" if it can.

    Args:
        line: the line; None if it is not spelled as one.
        number: the number that it must have.
        head: the hash of the line before.
    """
    if line is None:
        return f"line {number} is not a line of an audit log: it was changed or inserted"
    if digest(line) != line["hash"]:
        return f"line {number} was changed: its hash does not fit what it says"
    found = line["number"]
    if found is None or found < number:
        return (f"line {number} has the number {found}: a line was inserted here or before, or lines were put into "
                "another order")
    if found > number:
        missing = f"line {number} is" if found == number + 1 else f"lines {number} to {found - 1} are"
        return f"{missing} missing: the line with the number {found} stands there"
    if line["previous"] != head:
        before = f"line {number - 1}, which" if number > 1 else "a line that is missing or"
        return (f"line {number} follows another line than the one that stands before it: {before} was changed, or "
                "exchanged for another")
    return ""
