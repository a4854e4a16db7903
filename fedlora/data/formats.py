"""The four file formats, each read as a stream of (line number, {column: value}).

Text formats are read line by line with the standard library, because neither pyarrow nor `datasets` can say on which
line of a file a row is. A fault is noted with file, line and remedy. No row is ever quoted: it may be a patient's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedlora.data.lines import add_bare_return, bare_return, is_another, lines_of
from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown
from fedlora.data.tables import table

Record = tuple[int, dict[str, Any]]

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def records(file: Path, wanted: Callable[[str], bool], problems: Problems) -> Iterator[Record]:
    """Yield every readable row of a file with its line number (in parquet, its row number), counted from 1.

    Args:
        file: the file. Its suffix decides the format.
        wanted: returns whether a column of this name is needed. A parquet file's other columns are not read; rows have
            their names with the value None.
        problems: collects what is wrong with the file.
    """
    suffix = file.suffix.lower()
    try:
        if is_another(file, problems, expected=b"PAR1" if suffix == ".parquet" else b""):
            return
        if suffix == ".jsonl":
            yield from _jsonl(file, problems)
        elif suffix == ".parquet":
            from fedlora.data.parquet import parquet

            yield from parquet(file, wanted, problems)
        else:
            yield from table(file, problems)
    except OSError as error:
        problems.add(shown(file), f"the file cannot be read: {error.strerror or type(error).__name__}",
                     "Check the path and its permissions")


def _jsonl(file: Path, problems: Problems) -> Iterator[Record]:
    for number, line in lines_of(file, problems):
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
