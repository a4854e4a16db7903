"""Cells of further columns of rows that were read, such as ids, to be written beside what a model says of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.data.columns import Everything, Needs, RowFormat, find_column
from fedlora.data.formats import opened_records
from fedlora.data.options import ReadOptions
from fedlora.data.problems import Problems
from fedlora.data.rows import Rows, Workbook, shown


def kept_cells(rows: Rows, wanted: Sequence[str], form: RowFormat, *, columns: Mapping[str, str] | None = None,
               options: ReadOptions | None = None) -> list[tuple[Any, ...]]:
    """Return for each row its cells in the wanted columns, None where there is none. The files are read again.

    Args:
        rows: the rows that were read.
        wanted: names of columns of the files, which may differ from them in capitals and outer blanks.
        form: the columns that were read.
        columns: the file's name for a column, where it was not the expected one.
        options: how the files were read.

    Raises:
        ValueError: a file has no such column, is not on this machine, or was changed since.
    """
    if not wanted:
        return [()] * len(rows)
    options = options or ReadOptions()
    found: list[tuple[Any, ...] | None] = [None] * len(rows)
    for file, indices in zip(rows.files, rows.by_file(), strict=True):
        row_of = {int(rows.lines[row]): int(row) for row in indices}
        missing = set(wanted)
        for line, record in _records(file, Needs(form, dict(columns or {}), None), options):
            if line not in row_of:
                continue
            names = [find_column(name, record) for name in wanted]
            missing -= {name for name, column in zip(wanted, names, strict=True) if column is not None}
            found[row_of[line]] = tuple(None if name is None else record.get(name) for name in names)
        if missing and len(indices):
            raise ValueError(f"{shown(file)} has no column {shown(sorted(missing)[0])} to keep; name one that it has")
    if None in found:
        raise ValueError("the files were changed while they were read; give the command again")
    return [cells for cells in found if cells is not None]


def _records(file: str, needs: Needs, options: ReadOptions) -> list[tuple[int, dict[str, Any]]]:
    path = Path(file)  # not expanded again: the name of a file in a folder may begin with ~
    if not path.is_file():
        raise ValueError(f"{shown(file)} is not a file on this machine, so no further column of it can be kept")
    if isinstance(file, Workbook):
        options = dataclasses.replace(options, sheet=file.sheet)
    by_column = isinstance(file, Workbook) or path.suffix.lower() == ".parquet"
    opened = opened_records(path, Everything() if by_column else needs, options, Problems())
    return [] if opened is None else list(opened[1])
