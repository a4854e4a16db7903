"""The file formats, each read as a stream of (line number, {column: value}).

Text formats are read line by line with the standard library, because neither pyarrow nor `datasets` can say on which
line of a file a row is. A fault is noted with file, line and remedy. No row is ever quoted: it may be a patient's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.data.columns import Needs
from fedlora.data.grid import Record
from fedlora.data.lines import add_bare_return, bare_return, is_another, lines_of
from fedlora.data.options import ReadOptions
from fedlora.data.packing import Unusable, is_packed
from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown
from fedlora.data.tables import table

WORKBOOK = ".xlsx"

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", WORKBOOK)

PACKED = (".jsonl.gz", ".csv.gz", ".tsv.gz")

ACCEPTED = ".jsonl, .csv, .tsv (each also with .gz), .parquet, .xlsx"


def suffix_of(name: str) -> str:
    """Return the suffix of a file that can be read, such as ".csv.gz"; "" for any other name."""
    lower = name.lower()
    return next((suffix for suffix in (*PACKED, *SUFFIXES) if lower.endswith(suffix)), "")


_BEGINNINGS = {".parquet": b"PAR1", WORKBOOK: b"PK\x03\x04"}
"""First bytes of files that are not text."""


def opened_records(file: str | Path, needs: Needs, options: ReadOptions, problems: Problems
                   ) -> tuple[str, Iterator[Record]] | None:
    """Return a file's name for `fedlora.data.rows.place`, and a stream of its readable rows.

    Each row comes with its line number (in parquet and in a workbook, its row number), counted from 1.

    Args:
        file: the file. Its suffix decides the format.
        needs: the columns that are needed. A parquet file's other columns are not read; rows have their names with the
            value None.
        options: what the owner says about the file.
        problems: collects what is wrong with the file.

    Returns:
        The name and the rows; None if the file cannot be opened, which is then noted as a fault.
    """
    path = Path(file)
    if suffix_of(path.name) != WORKBOOK:
        return str(file), _records(path, needs, options, problems)
    from fedlora.data.workbook import workbook

    try:
        if not is_another(path, problems, expected=_BEGINNINGS[WORKBOOK]):
            return workbook(path, needs, options.sheet, problems)
    except Unusable as error:
        problems.add(shown(file), error.what, error.remedy)
    except OSError as error:
        _add_unreadable(path, error, problems)
    return None


def _records(file: Path, needs: Needs, options: ReadOptions, problems: Problems) -> Iterator[Record]:
    suffix = suffix_of(file.name)
    read_as: dict[str, str] = {}
    try:
        if is_another(file, problems, expected=_BEGINNINGS.get(suffix, b"")):
            return
        if suffix == ".parquet":
            from fedlora.data.parquet import parquet

            yield from parquet(file, needs, problems)
        elif suffix.startswith(".jsonl"):
            yield from _jsonl(file, options, problems, read_as)
        else:
            yield from table(file, needs, options, problems, read_as)
        if is_packed(file.name):
            read_as["unpacked by gzip"] = ""
        if read_as:
            wrong = " or ".join(filter(None, read_as.values()))
            problems.remark(shown(file), f"read {', '.join(read_as)}", f"If that is wrong, add {wrong}" if wrong else
                            "Nothing need be done")
    except Unusable as error:
        problems.add(shown(file), error.what, error.remedy)
    except OSError as error:
        _add_unreadable(file, error, problems)


def _add_unreadable(file: Path, error: OSError, problems: Problems) -> None:
    problems.add(shown(file), f"the file cannot be read: {error.strerror or type(error).__name__}",
                 "Check the path and its permissions")


def _jsonl(file: Path, options: ReadOptions, problems: Problems, read_as: dict[str, str]) -> Iterator[Record]:
    for number, line in lines_of(file, options.encoding, problems, read_as):
        if not line.strip():
            continue
        where = place(str(file), number)
        try:
            row = json.loads(line)
            if isinstance(row, dict) and any(line.count(f'"{name}"') > 1 for name in row):
                json.loads(line, object_pairs_hook=_object)  # slower, and rarely needed
        except _Twice:
            problems.add(where, "the object has the same name twice", "Write each name once")
            continue
        except json.JSONDecodeError as error:
            if bare_return(line):
                add_bare_return(file, number, problems)
                return
            if number == 1 and line.lstrip().startswith("["):
                problems.add(where, "the line is not valid JSON: the file seems to be one JSON array",
                             "Write one object per line instead, without the brackets")
                return
            problems.add(f"{where} (character {error.colno})", "the line is not valid JSON",
                         "Write one complete object per line")
            if number == 1 and line.strip() == "{":
                return  # an object written over many lines: each line would be a fault
            continue
        except (ValueError, RecursionError):
            problems.add(where, "the line is JSON nested too deeply or with a number too long",
                         "Write one flat object per line")
            continue
        if not isinstance(row, dict):
            problems.add(where, f"the line is a JSON {type(row).__name__}, not an object",
                         'Write one object per line: {"text": …, "label": …}')
        else:
            yield number, row


class _Twice(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with the same name twice. json would silently keep the last value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Twice
    return made
