"""Which columns of a file are which of a task's, found by its first row."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.data.columns import (
    KindOfRows,
    RowFormat,
    column_names,
    find_column,
    folded,
    required,
    show_columns,
    suggestion,
)
from fedlora.data.formats import records
from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown

_SAMPLE = 50
"""Rows of a file that are looked at when its columns are not known."""


@dataclass
class Layout:
    """A file's columns.

    Attributes:
        kind: of `fedlora.data.rows.KINDS`.
        wanted: the names of text columns, of the answer's and of the unit's, as task and flags have them.
        texts: the file's names of the text columns.
        answer, unit: the file's names of those; None where there is none (yet).
        present: all names met so far.
    """

    kind: str
    wanted: tuple[tuple[str, ...], str | None, str | None]
    present: dict[str, None] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    answer: str | None = None
    unit: str | None = None

    def extend(self, row: Mapping[str, Any]) -> None:
        """Take notice of further names: a line of .jsonl may have others than the first."""
        self.present |= dict.fromkeys(row)
        texts, answer, unit = self.wanted
        self.texts = tuple(find_column(name, self.present) or name for name in texts)
        self.answer = None if answer is None else find_column(answer, self.present)
        self.unit = None if unit is None else find_column(unit, self.present)

    @property
    def needs_second(self) -> bool:
        """Whether the second text must be there in each row."""
        return self.kind != "pair"

    def repeats(self, row: Mapping[str, Any]) -> bool:
        """Whether a row's first text is its column's name, and so is each other value that is read."""
        others = [name for name in (*self.texts[1:], self.answer, self.unit) if name is not None]
        return bool(others) and all(row.get(name) == name for name in others)


class LayoutFinder:
    """Finds the same kind of rows in all files.

    Args:
        names: the file's names for the task's columns, of those that --column names.
        forms: what the files of all tasks hold, by their names.
    """

    def __init__(self, task: str, form: RowFormat, names: Mapping[str, str], unit: str | None,
                 forms: Mapping[str, RowFormat], problems: Problems) -> None:
        self.task, self.form, self.names, self.unit, self.forms = task, form, names, unit, forms
        self.problems = problems
        self.kind_of_rows: KindOfRows | None = None
        self._first_file = ""

    def find(self, file: str, row: Mapping[str, Any]) -> Layout | None:
        """The first kind that has all columns which --column names, and whose own are in a file's first row, but for
        those that a row may lack. None where that is none, or another than in the files before; it is noted.
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
        """A row may lack its answer or the second of a pair; a file whose rows all do has no such column."""
        present = layout.present
        if any(find_column(name, present) is None for name in layout.wanted[0]):
            self._note_missing(file, present)
        elif self.form.answer is not None and layout.answer is None:
            column = self.form.answer.column
            self._note_no_column(file, present, self._name(column), f"Name yours with --column {column}=NAME", column)
        for wanted, name in zip((*layout.wanted[0], *layout.wanted[1:]), (*layout.texts, layout.answer, layout.unit),
                                strict=True):
            if wanted is not None and name is not None and name != wanted:
                self.problems.remark(shown(file), f"the column {shown(name)} is taken for {shown(wanted)}",
                                     "Name another if it is not")

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
        also = f"several are called {shown(self._name(twice[0]))}, but for capitals and blanks; " if twice else ""
        self.problems.add(place(file, 1), f"{self.task} needs the columns {wanted}; {also}{columns}", remedy + likely)

    def _note_no_column(self, file: str, row: Mapping[str, Any], name: str, remedy: str, missing: str | None = None
                        ) -> None:
        columns, likely = self._columns(file, row, {missing} if missing else set())
        what = f"there is no column {shown(name)}"
        if len(_alike(name, row)) > 1:
            what = f"several columns are called {shown(name)}, but for capitals and blanks"
        self.problems.add(place(file, 1), f"{what}; {columns}", remedy + likely)

    def _columns(self, file: str, row: Mapping[str, Any], missing: set[str]) -> tuple[str, str]:
        """What is shown of a file's columns, and the --column that may be meant."""
        usual = {*self.names.values(), *([self.unit] if self.unit else []),
                 *(name for form in self.forms.values() for name in column_names(form))}
        sample = _first_rows(file)
        said = show_columns(file, tuple(row), usual, sample)
        free = [name for name in row if name != self.unit and name not in self.names.values()]
        likely = suggestion(self.form, missing - self.names.keys(), free, sample) if said.startswith("its") else ""
        return said, f". Perhaps {likely}" if likely else ""

    def _other_task(self, row: Mapping[str, Any]) -> str | None:
        """The task whose columns these are, every one that it needs."""
        return next((name for name, form in self.forms.items() if name != self.task for one in form.kinds
                     if one[0] != "text" and all(find_column(column, row) for column in one[1])
                     and (form.answer is None or find_column(form.answer.column, row))), None)


def _alike(wanted: str, names: Collection[str]) -> list[str]:
    return [name for name in names if folded(name) == folded(wanted)]


def _first_rows(file: str) -> list[dict[str, Any]]:
    path = Path(file)  # expanded before, and a file's own name may begin with ~
    if not path.is_file():
        return []
    return [row for _, row in itertools.islice(records(path, lambda _: True, Problems()), _SAMPLE)]
