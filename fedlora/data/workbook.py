"""Reading of .xlsx workbooks with openpyxl, which only data holders with workbooks install."""

from __future__ import annotations

import posixpath
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fedlora.data.columns import Needs, folded
from fedlora.data.grid import Grid, Record
from fedlora.data.packing import Unusable, check_unpacked
from fedlora.data.problems import Problems
from fedlora.data.rows import Workbook, place, shown

_ERRORS = frozenset(("#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!", "#SPILL!", "#CALC!"))

_EXACT = 10**15
"""Numbers from here on have more than the 15 digits that Excel keeps."""

_DAMAGED = ("the workbook cannot be read: it is damaged, or no .xlsx", "Save it again as .xlsx, or its sheet as .csv")


def workbook(file: Path, needs: Needs, given: str | None, problems: Problems
             ) -> tuple[str, Iterator[Record]] | None:
    """Choose the sheet of a workbook, and return the workbook's name with that sheet, and a stream of the sheet's rows.

    The values are those that the workbook stores, also for formulas. Numbers become text: 1.0 becomes "1". Hidden
    sheets are not read.

    Args:
        file: the workbook.
        needs: the columns that the task needs.
        given: the name of the sheet; None for the only one with these columns, or else the first.
        problems: takes the faults and remarks.

    Returns:
        The name and the rows; None if the sheet cannot be read, which is then noted as a fault.

    Raises:
        ValueError: openpyxl is not installed.
        Unusable: the file unpacks to far more than a workbook does.
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{shown(file)} is a workbook, and reading it needs the package openpyxl. Install that with "
                         "pip install 'openpyxl>=3.1', or save the sheet as .csv") from None
    try:
        with zipfile.ZipFile(file) as archive:
            check_unpacked(sum(part.file_size for part in archive.infolist()), file.stat().st_size)
        warnings.filterwarnings("ignore", module=r"openpyxl\.")  # about what is not read; some quote a cell
        book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
        sheets = {sheet.title: sheet for sheet in book.worksheets if sheet.sheet_state == "visible"}
        chosen = _chosen(file, {name: _first_row(sheet)[1] for name, sheet in sheets.items()}, needs, given, problems)
        if chosen is None:
            book.close()
            return None
        marks = _Marks.of(file, chosen)
    except (OSError, MemoryError, Unusable):
        raise
    except Exception:  # openpyxl raises whatever a malformed part of the file leads to
        problems.add(shown(file), *_DAMAGED)
        return None
    name = Workbook.of(str(file), chosen)
    return name, _rows(book, sheets[chosen], name, marks, needs, problems)


def _first_row(sheet: Any) -> tuple[int, list[str]]:
    """Return the number and the cells of a sheet's first row that is not empty."""
    sheet.reset_dimensions()  # some programs write wrong ones
    for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
        if any(cell is not None for cell in cells):
            return number, ["" if cell is None else str(cell).strip() for cell in cells]
    return 0, []


def _chosen(file: Path, sheets: dict[str, list[str]], needs: Needs, given: str | None, problems: Problems
            ) -> str | None:
    """Return the name of the sheet to read, and note a fault if it cannot be told.

    Args:
        file: the workbook.
        sheets: name of each sheet → its first row.
        needs: the columns that the task needs.
        given: the name that the owner gives.
        problems: takes the fault or a remark.
    """
    there = ", ".join(map(shown, sheets))
    if given is not None:
        found = [name for name in sheets if name == given] or [name for name in sheets if folded(name) == folded(given)]
        if len(found) != 1:
            problems.add(shown(file), f"the workbook has no visible sheet {shown(given)}; it has: {there or 'none'}",
                         "Correct --sheet")
            return None
        return found[0]
    if not sheets:
        problems.add(shown(file), "the workbook has no visible sheet", "Show the sheet with the rows")
        return None
    fitting = [name for name, header in sheets.items() if needs.fits(header)]
    if len(fitting) > 1:
        problems.add(shown(file), "several sheets of the workbook have the needed columns: "
                     f"{', '.join(map(shown, fitting))}", f"Name one with --sheet, as in --sheet '{shown(fitting[0])}'")
        return None
    chosen = (fitting or list(sheets))[0]
    if len(sheets) > 1 and fitting:
        problems.remark(shown(file), f"of its sheets {there}, only {shown(chosen)} has the needed columns and is read",
                        "Name another one with --sheet if that is wrong")
    return chosen


def _rows(book: Any, sheet: Any, name: Workbook, marks: _Marks, needs: Needs, problems: Problems) -> Iterator[Record]:
    where = partial(place, name)
    first, header = _first_row(sheet)
    at = {column: index for index, column in enumerate(header) if column and needs(column)}
    for top, left, bottom, right in marks.merged:
        if bottom > first and any(left <= index <= right for index in at.values()):
            problems.add(where(max(top, first + 1)), "cells are merged, so that only the first of them holds the value",
                         "Unmerge them, and write the value into each")

    def padded() -> Iterator[tuple[int, Sequence[Any]]]:
        for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
            yield number, (*cells, *[None] * (len(header) - len(cells))) if any(
                cell is not None for cell in cells) else ()

    number = first
    try:
        grid = Grid(where, problems, "Name every column in the first row, and remove cells beside the table")
        for number, row in grid.records(padded()):
            for column, index in at.items():
                if (number, index) in marks.unstored:
                    problems.add(where(number), f"the {shown(column)} is a formula whose result is not stored",
                                 "Open the workbook in a spreadsheet program, and save it there")
                row[column] = _value(row.get(column), where(number), column, problems)
            if number in marks.hidden:
                problems.remark(where(number), "the row is hidden, by a filter perhaps, and is read like all others",
                                "Remove it if it is not meant")
            yield number, row
    except (zipfile.BadZipFile, ElementTree.ParseError, EOFError, ValueError, KeyError, IndexError, TypeError):
        problems.add(where(number + 1), *_DAMAGED)
    finally:
        book.close()


def _value(value: Any, where: str, column: str, problems: Problems) -> Any:
    if isinstance(value, str):
        if value in _ERRORS:
            problems.add(where, f"the {shown(column)} is an error that the spreadsheet program shows, such as #REF!",
                         "Correct its formula, or write the value")
        return None if value == "#N/A" else value.replace("_x000D_", "\r") or None  # Excel's way to write "\r"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if abs(value) >= _EXACT:
        problems.add(where, f"the {shown(column)} is a number of more than 15 digits, which a workbook does not hold "
                     "exactly", "Format the column as text, and write the values again")
    return str(int(value)) if value == int(value) else str(value)


@dataclass
class _Marks:
    """What openpyxl does not tell of a sheet that is read row by row.

    Attributes:
        hidden: numbers of hidden rows.
        merged: (first row, first column, last row, last column) of merged cells; columns are counted from 0.
        unstored: (row, column) of formulas without a stored result.
    """

    hidden: set[int] = field(default_factory=set)
    merged: list[tuple[int, int, int, int]] = field(default_factory=list)
    unstored: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, file: Path, sheet: str) -> _Marks:
        """Return the marks of a sheet."""
        marks = cls()
        with zipfile.ZipFile(file) as archive:
            part = _part_of(archive, sheet)
            if part is None:
                return marks
            with archive.open(part) as stream:
                number = 0
                for _, element in ElementTree.iterparse(stream):
                    kind = element.tag.rpartition("}")[2]
                    if kind == "row":
                        number = int(element.get("r") or number + 1)
                        marks._add_row(number, element)
                        element.clear()
                    elif kind == "mergeCell" and (found := re.findall(r"([A-Z]+)(\d+)", element.get("ref") or "")):
                        (left, top), (right, bottom) = found[0], found[-1]
                        marks.merged.append((int(top), _index(left), int(bottom), _index(right)))
        return marks

    def _add_row(self, number: int, row: ElementTree.Element) -> None:
        if row.get("hidden") in ("1", "true"):
            self.hidden.add(number)
        column = -1
        for cell in row:
            letters = re.match(r"[A-Z]+", cell.get("r") or "")
            column = _index(letters[0]) if letters else column + 1
            parts = {child.tag.rpartition("}")[2]: child for child in cell}
            if "f" in parts and cell.get("t") != "str" and ("v" not in parts or not parts["v"].text):
                self.unstored.add((number, column))


def _part_of(archive: zipfile.ZipFile, sheet: str) -> str | None:
    """Return the name of a sheet's part in a workbook's archive."""
    if not {"xl/workbook.xml", "xl/_rels/workbook.xml.rels"} <= set(archive.namelist()):
        return None
    links = {link.get("Id"): link.get("Target") or ""
             for link in ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))}
    for element in ElementTree.fromstring(archive.read("xl/workbook.xml")).iter():
        if element.tag.rpartition("}")[2] == "sheet" and element.get("name") == sheet:
            target = next((links.get(value, "") for key, value in element.items() if key.endswith("}id")), "")
            part = posixpath.normpath(posixpath.join("xl", target)).lstrip("/")
            return part if part in archive.namelist() else None
    return None


def _index(letters: str) -> int:
    """Return the number of a column, counted from 0, by its letters."""
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1
