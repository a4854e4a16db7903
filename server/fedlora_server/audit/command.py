"""fedlora-server audit-log: check that a run's audit log was not changed, and show what it says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import Parser, faults_in_words

from .chain import FILE, Chain, Line, read

if TYPE_CHECKING:
    from fedlora.privacy.report import Verified

NOT_VERIFIED = 1
COLUMNS = ("number", "time", "event", "client", "round", "attempt", "code", "bytes", "sha256", "peer", "fingerprint",
           "more")
"""The fields that `show` prints."""
SHORT = 12
"""Digits of a hash that `show` prints."""


@faults_in_words("fedlora-server audit-log")
def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0 fine, 1 the log does not verify, 2 wrong input."""
    options = parser().parse_args(argv)
    file = options.run / FILE if options.run.is_dir() else options.run
    if not file.exists():
        raise ValueError(f"{options.run} holds no {FILE}; name the folder of a run of fedlora-server, or a copy of its "
                         "audit log")
    chain = read(file)
    if not (chain.lines or chain.wrong or chain.torn_bytes):
        raise ValueError(f"{file} is empty; it is not the audit log of a run")
    return _verify(file, chain, options) if options.action == "verify" else _show(file, chain, options)


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server audit-log", description=f"The audit log of a run ({FILE} in its folder): who joined, "
        "uploaded, and was averaged, in lines that are chained by their hashes.",
        epilog="exit codes: 0 fine; 1 the log, its head or a report does not fit; 2 wrong input")
    actions = made.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, options: str, text: str) -> argparse.ArgumentParser:
        part = actions.add_parser(name, help=text, description=text, usage=f"{made.prog} {name} RUN {options}")
        part.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or a copy of its audit log")
        return part

    verified = action("verify", "[--head HASH] [--report privacy.json …]",
                      "Check that no line was changed, left out, moved or inserted.")
    verified.add_argument("--head", metavar="HASH", help="a hash that the server printed at the end of the "
                          "run; without it, nobody notices if lines were cut off at the end or all were written anew")
    verified.add_argument("--report", type=Path, nargs="+", default=[], metavar="privacy.json",
                          help="signed privacy reports of clients (privacy.dsse.json, or privacy.json beside it): "
                               "their uploads must be those in the log")
    shown = action("show", "[--client NAME] [--event KIND]", "Show the lines as a table.")
    shown.add_argument("--client", metavar="NAME", help="only the lines about this client")
    shown.add_argument("--event", metavar="KIND", help="only the lines of this kind, such as uploaded or accepted")
    return made


def _hash(text: str) -> str:
    digits = text.strip().lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"--head {text} is not a hash of 64 hexadecimal digits; give one that the server printed")
    return digits


def _verify(file: Path, chain: Chain, options: argparse.Namespace) -> int:
    from .compare import read_report

    head = None if options.head is None else _hash(options.head)
    reports = [(path, read_report(path)) for path in options.report]
    if wrong := _wrong(chain):
        print(f"{file} does not verify: {wrong}.")
        return NOT_VERIFIED
    print(f"{file}: {len(chain.lines):,} lines, none changed, left out, moved or inserted. Head {chain.head}.")
    ends = chain.lines[-1]["event"] == "ended"
    print(f"The server ended the log ({chain.lines[-1]['code']})." if ends else
          "The server has not ended the log: it still runs, it was killed, or lines were cut off at the end.")
    fine = _check_head(chain, head)
    for path, report in reports:
        fine = _check_report(chain.lines, path, report) and fine
    return 0 if fine else NOT_VERIFIED


def _wrong(chain: Chain) -> str:
    """Return what is wrong with the log; "" if nothing is."""
    if chain.wrong:
        return chain.wrong
    if chain.torn_bytes:
        return (f"line {len(chain.lines) + 1} is torn: it has {chain.torn_bytes} bytes and no end. A server that was "
                "killed leaves such a line, and cuts it off when the run is resumed")
    return ""


def _check_head(chain: Chain, head: str | None) -> bool:
    """Say whether the head is one of the log's, and return it."""
    if head is None:
        print("Without --head it cannot be noticed if lines were cut off at the end, or if the whole log was written "
              "anew.")
        return True
    at = next((number for number, line in enumerate(chain.lines, start=1) if line["hash"] == head), None)
    if at is None:
        print(f"The log does not verify: no line has the hash {head}. Lines were cut off at the end, the log was "
              "written anew, or the head is that of another run.")
        return False
    later = len(chain.lines) - at
    print(f"The head fits: it is that of the last line, number {at:,}." if not later else
          f"The head fits: it is that of line {at:,}. {later:,} lines were added since, as when a run is resumed.")
    return True


def _check_report(lines: Sequence[Line], path: Path, report: Verified) -> bool:
    """Say whether a client's report fits the log, and return it."""
    from .compare import compare

    found = compare(lines, report)
    for wrong in found.wrong:
        print(f"{path} does not fit: {wrong}.")
    keys = ", ".join(found.fingerprints) or "none (the run had no TLS)"
    print(f"{path}: client {found.client}, {found.uploads} uploads are in the report and in the log. Certificate "
          f"fingerprint in the log: {keys}. The report is signed by {found.public_key}.")
    for round, attempt in found.unanswered:
        print(f"{path}: round {round}, attempt {attempt} was sent, and not used: it came too late, was refused, or its "
              "round was not closed.")
    return not found.wrong


def _show(file: Path, chain: Chain, options: argparse.Namespace) -> int:
    wanted = [line for line in chain.lines if options.client in (None, line["client"])
              and options.event in (None, line["event"])]
    print("\n".join(_table(wanted)))
    if wrong := _wrong(chain):
        print(f"fedlora-server audit-log: {file} does not verify: {wrong}. Shown is what stands before it",
              file=sys.stderr)
        return NOT_VERIFIED
    return 0


def _table(lines: Iterable[Line]) -> Iterator[str]:
    """Yield the rows of a table, with a blank cell where a line says nothing."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for line in lines:
        shown = dict(line) | {field: (line[field] or "")[:SHORT] for field in ("sha256", "fingerprint")}
        shown["more"] = shown["more"] or None
        rows.append(tuple("" if shown[name] is None else str(shown[name]) for name in COLUMNS))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
