"""Rows of cells under a header, from a table's text or a workbook's sheet, as records by the names of their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedlora.data.columns import folded
from fedlora.data.problems import Problems
from fedlora.data.totals import may_be_totals

Record = tuple[int, dict[str, Any]]


class Grid:
    """A reader of rows of cells.

    What spreadsheets leave around the data is recognised: columns without a name, whose cells are empty; empty rows; a
    first column without a name, which holds numbers of rows; a line of totals.

    Args:
        where: returns a row's place, for messages.
        problems: collects what is wrong.
        remedy: how to correct a row with too many or too few cells.
    """

    def __init__(self, where: Callable[[int], str], problems: Problems, remedy: str) -> None:
        self._where, self._problems, self._remedy = where, problems, remedy
        self._header: list[str] = []
        self._width = 0
        self._named: list[tuple[int, str]] = []
        self._unnamed: list[int] = []
        self._folded: set[str] = set()

    def records(self, rows: Iterator[tuple[int, Sequence[Any]]]) -> Iterator[Record]:
        """Yield each row as {column: value} with its number. The first row that is not empty is the header.

        Args:
            rows: number and cells of each row. An empty cell is None or "", and becomes None.
        """
        held: list[tuple[int, Sequence[Any]]] = []
        for number, cells in rows:
            if not any(cells) and all(cell is None or cell == "" for cell in cells):
                if cells:
                    self._problems.remark(self._where(number), "the row is empty", "It is left out")
                continue
            if not self._header:
                if not self._is_header(number, [str("" if cell is None else cell).strip() for cell in cells]):
                    return
                continue
            if may_be_totals(cells):
                held.append((number, cells))
                continue
            if held:
                yield from self._no_totals(held)
                held.clear()
            if (row := self._row(number, cells)) is not None:
                yield number, row
        for number, _ in held:
            self._problems.add(self._where(number), "the row at the end is a line of totals, and not a record",
                               "Remove it, or put it before another row if it is a record")

    def _no_totals(self, held: Sequence[tuple[int, Sequence[Any]]]) -> Iterator[Record]:
        for number, cells in held:
            if (row := self._row(number, cells)) is not None:
                self._problems.remark(self._where(number), "the row looks like a line of totals, and is read as a "
                                      "record, because rows follow it", "Remove it if it is none")
                yield number, row

    def _is_header(self, number: int, names: list[str]) -> bool:
        """Take the header, and note a fault if it has a name twice or none at all."""
        self._width = len(names)
        while names and not names[-1]:
            names.pop()
        if not names:
            self._problems.add(self._where(number), "the first row names no column", "Write a header line")
            return False
        named = [name for name in names if name]
        if len(set(named)) != len(named):
            self._problems.add(self._where(number), "the header has the same name twice; it must name every column "
                               "once", "Correct the header line")
            return False
        self._header = names
        self._named = [(at, name) for at, name in enumerate(names) if name]
        self._unnamed = [at for at, name in enumerate(names) if not name and at]
        self._folded = set(map(folded, named))
        if not names[0]:
            self._problems.remark(self._where(number), "the first column has no name, as where row numbers were "
                                  "exported", "It is left out")
        return True

    def _row(self, number: int, cells: Sequence[Any]) -> dict[str, Any] | None:
        columns = len(self._header)
        if len(cells) < columns or (len(cells) > self._width and not _empty(cells[columns:])):
            self._problems.add(
                f"{self._where(number)} ({len(cells)} fields)",
                f"the row has more or fewer fields than the header, which has {columns}", self._remedy)
            return None
        if not _empty(cells[columns:]) or not _empty([cells[at] for at in self._unnamed]):
            self._problems.add(self._where(number), "a field stands in a column that has no name",
                               "Name the column in the header, or empty it; a separator in a text may also have moved "
                               "the fields")
            return None
        last = cells[columns - 1]
        if isinstance(last, str) and last.strip("\ufeff ").casefold() in self._folded and self._folded == {
                folded(str(cell)) for cell in cells[:columns] if cell}:
            self._problems.add(self._where(number), "the row repeats the header, as in exports that were joined",
                               "Remove it, and check that the rows below have the same columns")
            return None
        return {name: None if (cell := cells[at]) == "" else cell for at, name in self._named}


def _empty(cells: Sequence[Any]) -> bool:
    return all(cell is None or cell == "" for cell in cells)
