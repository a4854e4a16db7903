"""Reading of a path into `Rows`: finds the files, finds the columns that a task needs, and checks every row."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data.cells import AnswerCells, UnitCells, conversation, text_fault
from fedlora.data.columns import RowFormat, column_names, folded
from fedlora.data.formats import Record
from fedlora.data.layout import Layout, LayoutFinder
from fedlora.data.problems import Problems
from fedlora.data.remarks import check_units, remark_on
from fedlora.data.rows import Message, Rows, labelled_by, place
from fedlora.data.sources import sources

log = logging.getLogger(__name__)


def read_rows(path: Path | str, task: str, form: RowFormat, *, columns: Mapping[str, str] | None = None,
              unit: str | None = None, allow_download: bool = False, labels: bool = False,
              declared: Collection[str] = (), held_out: bool = False,
              others: Mapping[str, RowFormat] | None = None) -> Rows:
    """Read and check all rows of a file, a folder (its files in the order of their names), or a hub dataset.

    Warnings say which files of a folder are not read, and which rows may be read otherwise than their owner intends.

    Args:
        path: a .jsonl, .csv, .tsv or .parquet file, a folder of such files, or "org/dataset[/config][:split]".
        task: key of the task, for messages.
        form: the columns that the task reads.
        columns: the file's name for a column, where it is not the expected one: {"text": "note"}. A name means the
            column with exactly this name, else the only one that differs just in capitals and outer blanks.
        unit: the file's column with the id of the person (or other unit of privacy) that a row belongs to, for
            `Rows.units`; None if each row is its own unit. An id means the same unit in all files of a folder.
        allow_download: fetch a hub dataset that is not in the hub's cache on this machine.
        labels: whether answers are names of classes. If so they become `Rows.labels`, which are checked against the
            run's label set and which a client may announce. Other answers become `Rows.values`.
        declared: the label set, if it is known already. A word like "none" then counts as a label if it is in the set.
        held_out: whether the rows are for evaluation, not for training; see `fedlora.data.sources.sources`.
        others: task → the columns that it reads, for all tasks. It helps to recognise a header line, and files that
            belong to another task.

    Raises:
        ValueError: something is wrong. The message gives file, line and remedy of all faults, and never a row's text or
            id.
    """
    names, problems = dict(columns or {}), Problems()
    known = column_names(form)
    if unknown := sorted(set(names) - known):
        raise ValueError(f"--column {unknown[0]}=…: {task} has no column {unknown[0]}. Its columns are: "
                         f"{', '.join(sorted(known))}")
    _check_distinct(form, names, unit)
    reader = _Reader(LayoutFinder(task, form, names, unit, dict(others or {}) | {task: form}, problems), problems)
    wanted = {folded(names.get(name, name)) for name in known} | ({folded(unit)} if unit else set())
    for file, stream in sources(path, lambda name: folded(name) in wanted, problems, allow_download=allow_download,
                                held_out=held_out):
        reader.add(file, stream)
    rows = reader.rows(labels)
    if declared:
        rows = labelled_by(rows, declared)
    remark_on(rows, reader.missing_answers, problems, declared=declared)
    for line in problems.remarks():
        log.warning("%s", line)
    return rows


def _check_distinct(form: RowFormat, names: Mapping[str, str], unit: str | None) -> None:
    """Check that no column of a file is named for two purposes.

    Raises:
        ValueError: one column is named twice.
    """
    taken: dict[str, str] = {}
    for name, column in names.items():
        if (other := taken.setdefault(folded(column), name)) != name:
            raise ValueError(f"--column names {column} for both {other} and {name}. Name the column of each")
    for name in column_names(form):
        if unit is not None and folded(names.get(name, name)) == folded(unit):
            raise ValueError(f"--privacy-unit column:{unit} is the column that is read as {name}, and does not say "
                             "whose rows belong together. Name the column with the ids of people (or of other units)")


class _Reader:
    """A collector of checked rows, which are of the same kind in all files."""

    def __init__(self, finder: LayoutFinder, problems: Problems) -> None:
        self.finder, self.problems = finder, problems
        answer = finder.form.answer
        self.answer_cells = None if answer is None else AnswerCells(answer, problems)
        self.unit_cells = None if finder.unit is None else UnitCells(finder.unit, problems)
        self.files: list[str] = []
        self.file_of, self.lines = array("q"), array("q")
        self.texts: list[str] = []
        self.seconds: list[str | None] = []
        self.messages: list[tuple[Message, ...]] = []
        self.answers: list[Any] = []
        self.otherwise: list[str | None] = []
        self.units: list[str] = []

    def add(self, file: str, stream: Iterator[Record]) -> None:
        index, before = len(self.files), len(self.problems)
        self.files.append(file)
        layout: Layout | None = None
        for line, row in stream:
            if layout is None:
                layout = self.finder.find(file, row)
                if layout is None:
                    return
            elif not row.keys() <= layout.present.keys():
                layout.extend(row)
            self._add_row(file, line, layout, row)
            self.file_of.append(index)
            self.lines.append(line)
        if layout is not None:
            self.finder.check_optional(file, layout)
        elif len(self.problems) == before:
            self.problems.add(file, "the file holds no rows", "Add rows, or remove the file")

    def _add_row(self, file: str, line: int, layout: Layout, row: Mapping[str, Any]) -> None:
        get = row.get
        if layout.kind == "messages":
            turns, fault = conversation(get(layout.texts[0]))
            self.texts.append("")
            self.messages.append(turns)
            if fault:
                self.problems.add(place(file, line), *fault)
        else:
            text = get(layout.texts[0])
            if fault := text_fault(layout.texts[0], text):
                self.problems.add(place(file, line), *fault)
                text = ""
            elif text == layout.texts[0] and layout.repeats(row):
                self.problems.add(place(file, line), "the row repeats the names of the columns, as in exports that "
                                  "were joined", "Remove it, and check that the rows below have the same columns")
            self.texts.append(text)  # type: ignore[arg-type]
            if len(layout.texts) == 2:
                second = get(layout.texts[1])
                if (second is not None or layout.needs_second) and (fault := text_fault(layout.texts[1], second)):
                    self.problems.add(place(file, line), *fault)
                self.seconds.append(second)
        if self.answer_cells is not None:
            answer, other = self.answer_cells.read(file, line, None if layout.answer is None else get(layout.answer))
            self.answers.append(answer)
            self.otherwise.append(other)
        if self.unit_cells is not None:
            self.units.append(self.unit_cells.read(file, line, get(layout.unit or "")))

    @property
    def missing_answers(self) -> Mapping[str, int]:
        """Word that stands for a missing value → number of answers that held it."""
        return self.answer_cells.words if self.answer_cells is not None else {}

    def rows(self, labels: bool) -> Rows:
        """Return all rows that were read.

        Args:
            labels: whether answers are names of classes.

        Raises:
            ValueError: something is wrong with the rows or files.
        """
        kind_of_rows = self.finder.kind_of_rows
        kind, columns = kind_of_rows or ("", ())
        if kind == "pair" and all(second is None for second in self.seconds):
            kind = "text"  # some data sets of single sentences have an empty column sentence2
        elif None in self.seconds:
            for row in [row for row, second in enumerate(self.seconds) if second is None and kind == "pair"]:
                self.problems.add(self._where(row), f"{columns[1]} is empty, but not in other rows",
                                  "Fill it, or remove the row")
        check_units(self.units, self._where, self.problems)
        self.problems.raise_any()
        assert kind_of_rows is not None, "a path without a file to read was refused before"
        answers = None if self.answer_cells is None else tuple(self.answers)
        two = labels and any(one is not None for one in self.otherwise)
        return Rows(kind=kind, texts=tuple(self.texts),
                    seconds=tuple(self.seconds) if kind in ("pair", "completion") else None,  # type: ignore[arg-type]
                    messages=tuple(self.messages) if kind == "messages" else None,
                    labels=answers if labels else None, values=None if labels else answers,
                    files=tuple(self.files), file_of=np.array(self.file_of, dtype=np.int64),
                    lines=np.array(self.lines, dtype=np.int64),
                    units=None if self.unit_cells is None else tuple(self.units),
                    otherwise=tuple(self.otherwise) if two else None)

    def _where(self, row: int) -> str:
        return place(self.files[self.file_of[row]], self.lines[row])
