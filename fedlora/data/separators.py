"""The character between the fields of a table: what its owner names, or what the first line shows."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from fedlora.data.columns import Needs
from fedlora.data.lines import add_bare_return, bare_return
from fedlora.data.problems import Problems
from fedlora.data.rows import place

Lines = Iterator[tuple[int, str]]

NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
"""The separators that are looked for."""

_LINES_OF_A_HEADER = 20
"""Most lines of a first row, whose quoted names may hold line breaks."""


def named(separator: str) -> str:
    """Return a separator's name as messages show it."""
    return NAMES.get(separator, f"character {separator}")


def separated(file: Path, lines: Lines, given: str | None, needs: Needs, problems: Problems, read_as: dict[str, str]
              ) -> tuple[str, Lines] | None:
    """Find the separator of a table by its first line, and check the line's end.

    A separator counts if the first line holds it outside of quotation marks. Of several, the one is taken by which the
    line has columns that the task needs. If that does not decide, nothing is guessed.

    Args:
        file: the file. Its suffix decides the usual separator, a comma or a tab.
        lines: the file's lines.
        given: the separator that the owner names; None to find it.
        needs: the columns that the task needs.
        problems: takes the faults.
        read_as: takes a phrase that says which separator was found, unless it is the usual one, with the option that
            decides.

    Returns:
        The separator, and all lines; None if it cannot be told.
    """
    usual = "\t" if re.search(r"\.tsv(\.gz)?$", file.name.lower()) else ","
    first: list[tuple[int, str]] = []
    header = ""
    for number, line in lines:
        if not header and bare_return(line):
            add_bare_return(file, number, problems)
            return None
        hint = re.fullmatch(r'"?sep=(.)"?', line.rstrip("\r\n"), re.IGNORECASE) if not header else None
        if hint is not None:  # Excel writes and reads such a line
            first.append((number, "\n"))
            if given is None:
                given = hint[1]
                read_as[f"with the {named(given)} that its first line names"] = "--delimiter"
            continue
        first.append((number, line))
        if line.strip():
            header += line
            if header.count('"') % 2 == 0 or len(first) >= _LINES_OF_A_HEADER:
                break
    rest = itertools.chain(first, lines)
    if given is not None:
        return given, rest
    bare = re.sub(r'"[^"]*"', "", header.strip(" \r\n"))
    found = [separator for separator in NAMES if separator in bare]
    if len(found) > 1:
        fields = {separator: _fields(header, separator) for separator in found}
        likely = [separator for separator in found if any(map(needs, fields[separator]))] or (
            [usual] if usual in found else found)
        found = [separator for separator in likely if needs.fits(fields[separator])] if len(likely) > 1 else likely
        if len(found) != 1:
            problems.add(place(str(file), first[-1][0]), "the first line can be read with "
                         f"{' or '.join(f'{named(one)}s' for one in likely)} between the fields",
                         f"Say which with --delimiter, as in --delimiter {named(likely[0]).split()[-1]}")
            return None
    separator = found[0] if found else usual
    if separator != usual:
        read_as[f"with {named(separator)}s between the fields"] = "--delimiter"
    return separator, rest


def _fields(header: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=separator))
    except (csv.Error, StopIteration):
        return header.split(separator)
