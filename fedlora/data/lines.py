"""Numbered lines of a text file, and recognition of files that are of another kind than their names say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedlora.data.encoding import LONGEST, encoding_of, name_of, raw_lines, width
from fedlora.data.packing import is_packed, opened
from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown

_OTHERS = (
    (b"\x1f\x8b", "is packed by gzip, whatever its name says", "Name it {name}.gz"),
    (b"PK\x03\x04", "is a zip archive or an .xlsx workbook, whatever its name says",
     "Unpack it, or name it .xlsx if it is one"),
    (b"BZh", "is packed by bzip2, whatever its name says", "Unpack it: bunzip2 -c {name} > new{suffix}"),
    (b"\xfd7zXZ", "is packed by xz, whatever its name says", "Unpack it: xz -dc {name} > new{suffix}"),
    (b"PAR1", "is a parquet file, whatever its name says", "Name it .parquet"),
    (b"%PDF", "is a PDF, whatever its name says", "Export its rows as .csv or .jsonl"),
    (b"\xd0\xcf\x11\xe0", "is an old or an encrypted Office document, whatever its name says",
     "Save it as .xlsx without a password, or its sheet as .csv"),
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
    with opened(file) as stream:
        start = stream.read(64)
    if is_packed(file.name) and start.startswith(_OTHERS[0][0]):
        problems.add(shown(file), "the file is packed twice", "Unpack it once")
        return True
    for begin, what, remedy in _OTHERS:
        if begin != expected and start[:len(begin)].lower() == begin.lower():
            problems.add(shown(file), f"the file {what}",
                         remedy.format(name=shown(file.name), suffix=shown(file.suffix)))
            return True
    return False


def lines_of(file: Path, given: str | None, problems: Problems, read_as: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, counted from 1. A byte-order mark is dropped.

    Bytes that are not of the file's encoding are noted as a fault. If possible the line is yielded all the same, so
    that the faults of later lines are found too.

    Args:
        file: the file.
        given: the encoding that the owner names; None to find it.
        problems: takes the faults.
        read_as: takes a phrase that says which encoding was found, unless it is UTF-8, with the option that decides.
    """
    found = encoding_of(file, given, problems)
    if found is None:
        return
    encoding, said = found
    if said:
        read_as[said] = "--encoding" if given is None else ""
    wide = width(encoding) > 1
    with opened(file) as stream:
        small = not is_packed(file.name) and file.stat().st_size < LONGEST
        for number, raw in enumerate(raw_lines(stream, encoding, small=small), start=1):
            if len(raw) > LONGEST:
                problems.add(place(str(file), number), f"the line is longer than {LONGEST // 2**20} MiB",
                             "Write one row per line, and shorten the text; the rest of the file was not checked")
                return
            if not wide and b"\0" in raw:
                problems.add(place(str(file), number), "the line holds a zero byte, so it is not text in "
                             f"{name_of(encoding)}", "Save the file as UTF-8 text, or add --encoding utf-16 if it "
                             "is that")
                if number == 1:
                    return
                raw = raw.replace(b"\0", b"")
            try:
                line = raw.decode(encoding)
            except UnicodeDecodeError as error:
                problems.add(f"{place(str(file), number)} (byte {error.start + 1})",
                             f"the line is not {name_of(encoding)}",
                             "Other lines are, so two encodings may be mixed: save all of it as UTF-8, or name its "
                             "one encoding with --encoding" if given is None else
                             "Correct --encoding, or save the file as UTF-8")
                line = raw.decode(encoding, "replace")
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def bare_return(line: str) -> bool:
    """Return whether a line has a carriage return in it, other than at its end."""
    return "\r" in line.rstrip("\r\n")


def add_bare_return(file: Path, number: int, problems: Problems) -> None:
    """Note the fault that a line has a carriage return in it."""
    name = shown(file.name)
    problems.add(place(str(file), number), "the line holds a carriage return (\\r) without a line feed (\\n); "
                 "lines must end in \\n or \\r\\n", f"Convert the file: tr '\\r' '\\n' < {name} > new{file.suffix}")
