"""Assignment of a file's columns to the columns that a task reads, by the file's first row."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.data.columns import (
    Everything,
    KindOfRows,
    Needs,
    RowFormat,
    column_names,
    find_column,
    folded,
    required,
    show_columns,
    suggestion,
)
from fedlora.data.formats import opened_records
from fedlora.data.options import ReadOptions
from fedlora.data.problems import Problems
from fedlora.data.rows import Workbook, is_table, place, shown

_SAMPLE = 50
"""Rows of a file that are examined, to suggest columns, if the expected ones are missing."""


@dataclass
class Layout:
    """The columns of one file.

    Attributes:
        kind: the kind of rows, one of `fedlora.data.rows.KINDS`.
        wanted: names of the text columns, of the answer's column and of the unit's column, as the task and the options
            give them; None for a column that is not needed.
        present: names of all columns met so far, in order.
        texts: the file's own names of the text columns.
        answer: the file's own name of the answer's column; None if it has not been met.
        unit: the file's own name of the unit's column; None if it has not been met.
    """

    kind: str
    wanted: tuple[tuple[str, ...], str | None, str | None]
    present: dict[str, None] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    answer: str | None = None
    unit: str | None = None

    def extend(self, row: Mapping[str, Any]) -> None:
        """Add a row's columns to the known ones. A line of a .jsonl file may have columns that the first lacks."""
        self.present |= dict.fromkeys(row)
        texts, answer, unit = self.wanted
        self.texts = tuple(find_column(name, self.present) or name for name in texts)
        self.answer = None if answer is None else find_column(answer, self.present)
        self.unit = None if unit is None else find_column(unit, self.present)

    @property
    def needs_second(self) -> bool:
        """Whether every row must have the second text."""
        return self.kind != "pair"

    def repeats(self, row: Mapping[str, Any]) -> bool:
        """Return whether each value of a row other than the first text is the name of its own column.

        If that also holds for the first text, the row is a repeated header.
        """
        others = [name for name in (*self.texts[1:], self.answer, self.unit) if name is not None]
        return bool(others) and all(row.get(name) == name for name in others)


class LayoutFinder:
    """A finder of the columns in each file, which makes sure that all files have the same kind of rows.

    Args:
        task: key of the task.
        form: the columns that the task reads.
        names: the task's name of a column → the file's name, for the columns that --column gives.
        unit: the file's name of the unit's column; None if each row is a unit.
        forms: task → the columns that it reads, for all tasks.
        options: what the owner says about the files.
        problems: collects what is wrong.
    """

    def __init__(self, task: str, form: RowFormat, names: Mapping[str, str], unit: str | None,
                 forms: Mapping[str, RowFormat], options: ReadOptions, problems: Problems) -> None:
        self.options, self.needs = options, Needs(form, names, unit)
        self.task, self.form, self.names, self.unit, self.forms = task, form, names, unit, forms
        self.problems = problems
        self.kind_of_rows: KindOfRows | None = None
        self._first_file = ""

    def find(self, file: str, row: Mapping[str, Any]) -> Layout | None:
        """Find the columns of a file by its first row.

        The first kind of rows is taken that includes all columns which --column names, and whose required columns the
        row has.

        Returns:
            The layout; None if no kind fits, or another kind than in the files before. That is then noted as a fault.
        """
        beside = {self.form.answer.column} if self.form.answer else set()
        found = next((one for one in self.form.kinds if self.names.keys() - beside <= set(one[1])
                      and all(find_column(self._name(n), row) for n in required(one))), None)
        if found is None:
            self._note_missing(file, row)
            return None
        if self.unit is not None and find_column(self.unit, row) is None:
            self._note_no_column(file, row, self.unit, "Name yours with --privacy-unit column:NAME")
            return None
        if self.kind_of_rows is not None and self.kind_of_rows != found:
            self.problems.add(shown(file), f"the file has the columns {' + '.join(found[1])}, and "
                              f"{shown(self._first_file)} has {' + '.join(self.kind_of_rows[1])}",
                              "Use the same columns in all files of a folder")
            return None
        if self.kind_of_rows is None:
            self.kind_of_rows, self._first_file = found, file
        answer = None if self.form.answer is None else self._name(self.form.answer.column)
        layout = Layout(found[0], (tuple(map(self._name, found[1])), answer, self.unit))
        layout.extend(row)
        return layout

    def check_optional(self, file: str, layout: Layout) -> None:
        """Check, after a file's last row, that some row had the columns which a single row may lack.

        Those are the answer and the second text of a pair. Also remark on columns that were matched by a similar name.
        """
        present = layout.present
        if any(find_column(name, present) is None for name in layout.wanted[0]):
            self._note_missing(file, present)
        elif self.form.answer is not None and self.form.answer.needed and layout.answer is None:
            column = self.form.answer.column
            self._note_no_column(file, present, self._name(column), f"Name yours with --column {column}=NAME", column)
        for wanted, name in zip((*layout.wanted[0], *layout.wanted[1:]), (*layout.texts, layout.answer, layout.unit),
                                strict=True):
            if wanted is not None and name is not None and name != wanted:
                self.problems.remark(shown(file), f"the column {shown(name)} is taken for {shown(wanted)}",
                                     "Name another column if that is wrong")

    def _name(self, name: str) -> str:
        return self.names.get(name, name)

    def _note_missing(self, file: str, row: Mapping[str, Any]) -> None:
        wanted = ", or ".join(" + ".join(map(self._name, columns)) for _, columns in self.form.kinds)
        alone = [columns[0] for kind, columns in self.form.kinds if kind == "text"]
        example = alone[0] if alone else self.form.kinds[0][1][0]
        missing = {name for _, columns in self.form.kinds for name in columns if not find_column(self._name(name), row)}
        if self.form.answer is not None and not find_column(self._name(self.form.answer.column), row):
            missing.add(self.form.answer.column)
        columns, likely = self._columns(file, row, missing)
        if other := self._other_task(row):
            likely = ""
            remedy = f"These are rows of {other}: add --task {other}, or name a column with --column {example}=NAME"
        else:
            remedy = f"Name yours with --column {example}=NAME{self.form.otherwise}"
        twice = [name for name in missing if len(_alike(self._name(name), row)) > 1]
        also = f"several are called {shown(self._name(twice[0]))}, apart from capitals and blanks; " if twice else ""
        self.problems.add(place(file, 1), f"{self.task} needs the columns {wanted}; {also}{columns}", remedy + likely)

    def _note_no_column(self, file: str, row: Mapping[str, Any], name: str, remedy: str, missing: str | None = None
                        ) -> None:
        columns, likely = self._columns(file, row, {missing} if missing else set())
        what = f"there is no column {shown(name)}"
        if len(_alike(name, row)) > 1:
            what = f"several columns are called {shown(name)}, apart from capitals and blanks"
        self.problems.add(place(file, 1), f"{what}; {columns}", remedy + likely)

    def _columns(self, file: str, row: Mapping[str, Any], missing: set[str]) -> tuple[str, str]:
        """Return the description of a file's columns for a message, and the suggestion that ends the message."""
        usual = {*self.names.values(), *([self.unit] if self.unit else []),
                 *(name for form in self.forms.values() for name in column_names(form))}
        sample = _first_rows(file, self.needs, self.options)
        said = show_columns(file, tuple(row), usual, sample)
        free = [name for name in row if name != self.unit and name not in self.names.values()]
        likely = suggestion(self.form, missing - self.names.keys(), free, sample) if said.startswith("its") else ""
        return said, f". Perhaps {likely}" if likely else ""

    def _other_task(self, row: Mapping[str, Any]) -> str | None:
        """Return another task all of whose columns the row has; None if there is none."""
        return next((name for name, form in self.forms.items() if name != self.task for one in form.kinds
                     if one[0] != "text" and all(find_column(column, row) for column in one[1])
                     and (form.answer is None or find_column(form.answer.column, row))), None)


def _alike(wanted: str, names: Collection[str]) -> list[str]:
    return [name for name in names if folded(name) == folded(wanted)]


def _first_rows(file: str, needs: Needs, options: ReadOptions) -> list[dict[str, Any]]:
    path = Path(file)  # not expanded again: the name of a file in a folder may begin with ~
    if not path.is_file():
        return []
    if isinstance(file, Workbook):
        options = dataclasses.replace(options, sheet=file.sheet)
    opened = opened_records(path, needs if is_table(file) else Everything(), options, Problems())
    return [] if opened is None else [row for _, row in itertools.islice(opened[1], _SAMPLE)]
