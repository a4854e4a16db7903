"""Numbered lines of a text file, and recognition of files that are of another kind than their names say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown

LONGEST = 16 * 1024 * 1024
"""Most bytes of a line, and most characters of a field. Anything longer is an unclosed quotation, or not text."""

_OTHERS = (
    (b"\x1f\x8b", "is packed by gzip, whatever its name says", "Unpack it: gunzip -c {name} > new{suffix}"),
    (b"PK\x03\x04", "is a zip archive or an .xlsx workbook, whatever its name says",
     "Unpack it, or save the sheet as .csv in UTF-8"),
    (b"BZh", "is packed by bzip2, whatever its name says", "Unpack it: bunzip2 -c {name} > new{suffix}"),
    (b"\xfd7zXZ", "is packed by xz, whatever its name says", "Unpack it: xz -dc {name} > new{suffix}"),
    (b"PAR1", "is a parquet file, whatever its name says", "Name it .parquet"),
    (b"%PDF", "is a PDF, whatever its name says", "Export its rows as .csv or .jsonl"),
    (b"\xd0\xcf\x11\xe0", "is an old Office document, whatever its name says", "Save the sheet as .csv in UTF-8"),
    (b"SQLite format 3", "is an SQLite database, whatever its name says", "Export its rows as .csv or .jsonl"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull"),
    (b"/annex/objects/", "is a pointer of git-annex, not the file itself", "Fetch it: git annex get {name}"),
    (b"<!DOCTYPE html", "is a web page, as a download without the needed login gives", "Download the file itself"),
    (b"<html", "is a web page, as a download without the needed login gives", "Download the file itself"))


def is_another(file: Path, problems: Problems, *, expected: bytes = b"") -> bool:
    """Return whether a file begins like a file of another kind, and note it as a fault if so.

    Args:
        file: the file.
        problems: takes the fault.
        expected: the first bytes of the kind of file that this one should be; b"" for text.
    """
    with file.open("rb") as stream:
        start = stream.read(64)
    for begin, what, remedy in _OTHERS:
        if begin != expected and start[:len(begin)].lower() == begin.lower():
            problems.add(shown(file), f"the file {what}",
                         remedy.format(name=shown(file.name), suffix=shown(file.suffix)))
            return True
    return False


def lines_of(file: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers, counted from 1. A byte-order mark is dropped.

    Bytes that are not UTF-8 are noted as a fault. If possible the line is yielded all the same, so that the faults of
    later lines are found too.
    """
    with file.open("rb") as stream:
        small = file.stat().st_size < LONGEST  # then no line is too long; calling readline for each line is slower
        for number, raw in enumerate(stream if small else iter(lambda: stream.readline(LONGEST + 1), b""), start=1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    problems.add(place(str(file), 1), "the file is UTF-16 or UTF-32, not UTF-8",
                                 f"Convert it: iconv -f UTF-16 -t UTF-8 {shown(file.name)} > new{file.suffix}")
                    return
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > LONGEST:
                problems.add(place(str(file), number), f"the line is longer than {LONGEST // 2**20} MiB",
                             "Write one row per line, and shorten the text; the rest of the file was not checked")
                return
            if b"\0" in raw:
                problems.add(place(str(file), number), "the line holds a zero byte, so it is not UTF-8 text",
                             "Save the file as UTF-8 text")
                if number == 1:
                    return
                raw = raw.replace(b"\0", b"")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add(f"{place(str(file), number)} (byte {error.start + 1})", "the line is not UTF-8",
                             "If it is Latin-1 or Windows text: iconv -f WINDOWS-1252 -t UTF-8 "
                             f"{shown(file.name)} > new{file.suffix}")
                yield number, raw.decode("utf-8", "replace")


def bare_return(line: str) -> bool:
    """Return whether a line has a carriage return in it, other than at its end."""
    return "\r" in line.rstrip("\r\n")


def add_bare_return(file: Path, number: int, problems: Problems) -> None:
    """Note the fault that a line has a carriage return in it."""
    name = shown(file.name)
    problems.add(place(str(file), number), "the line holds a carriage return (\\r) without a line feed (\\n); "
                 "lines must end in \\n or \\r\\n", f"Convert the file: tr '\\r' '\\n' < {name} > new{file.suffix}")
