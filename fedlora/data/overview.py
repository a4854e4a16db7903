"""An overview of data files for their owner: columns, rows and labels as they are written. It holds no row's text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FileOverview:
    """One file that was read.

    Attributes:
        file: its name.
        rows: number of rows that were taken.
        columns: names of all its columns.
        taken: the task's name of a column, or "unit" → the file's name for it.
        left_out: "text", or the name of the column of answers → number of rows left out for lack of it.
    """

    file: str
    rows: int
    columns: tuple[str, ...]
    taken: Mapping[str, str]
    left_out: Mapping[str, int]


@dataclass
class Overview:
    """Facts about data files, which `fedlora.data.read_rows` fills in.

    Attributes:
        files: the files in order. A file whose columns cannot be used is left out.
        spelled: (label, text of the cell) → number of cells, where the two differ: in blanks, in invisible characters,
            in capitals from the only such name in the label set, or by --label-map.
    """

    files: list[FileOverview] = field(default_factory=list)
    spelled: Counter[tuple[str, str]] = field(default_factory=Counter)
