"""Reading of a path into `Rows`: finds the files, finds the columns that a task needs, and checks every row."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data.cells import COMPLETE, AnswerCells, Fault, UnitCells, conversation, text_fault
from fedlora.data.columns import RowFormat, column_names, folded
from fedlora.data.grid import Record
from fedlora.data.layout import Layout, LayoutFinder
from fedlora.data.options import ReadOptions
from fedlora.data.overview import FileOverview, Overview
from fedlora.data.problems import Problems
from fedlora.data.remarks import check_units, remark_on, remark_on_capitals
from fedlora.data.rows import Message, Rows, in_other_capitals, labelled_by, place, shown
from fedlora.data.sources import sources

log = logging.getLogger(__name__)


def read_rows(path: Path | str, task: str, form: RowFormat, *, columns: Mapping[str, str] | None = None,
              unit: str | None = None, allow_download: bool = False, labels: bool = False,
              declared: Collection[str] = (), held_out: bool = False,
              others: Mapping[str, RowFormat] | None = None, options: ReadOptions | None = None,
              overview: Overview | None = None) -> Rows:
    """Read and check all rows of a file, a folder (its files in the order of their names), or a hub dataset.

    Warnings say which files of a folder are not read, in what encoding and with what separator files are read unless
    these are the usual ones, and which rows may be read otherwise than their owner intends.

    Args:
        path: a .jsonl, .csv, .tsv, .parquet or .xlsx file, a folder of such files, or "org/dataset[/config][:split]".
            Text files may be packed by gzip (.csv.gz).
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
        options: what the owner says about the files, such as their separator and other names for labels.
        overview: takes facts about the files, also if something is wrong with them.

    Raises:
        ValueError: something is wrong. The message gives file, line and remedy of all faults, and never a row's text or
            id.
    """
    names, problems = dict(columns or {}), Problems()
    options = options or ReadOptions()
    if options.label_map and not labels:
        raise ValueError(f"--label-map: {task} has no labels. Leave the option out")
    known = column_names(form)
    if unknown := sorted(set(names) - known):
        raise ValueError(f"--column {unknown[0]}=…: {task} has no column {unknown[0]}. Its columns are: "
                         f"{', '.join(sorted(known))}")
    _check_distinct(form, names, unit)
    reader = _Reader(LayoutFinder(task, form, names, unit, dict(others or {}) | {task: form}, options, problems),
                     options, problems)
    for file, stream in sources(path, reader.finder.needs, options, problems, allow_download=allow_download,
                                held_out=held_out):
        reader.add(file, stream)
    if overview is not None:
        overview.files = reader.overviews
    rows = reader.rows(labels)
    reader.remark(path)
    if overview is not None:
        overview.spelled = _spellings(rows, reader.spelled, declared)
    if declared:
        remark_on_capitals(rows, declared, problems)
        rows = labelled_by(rows, declared)
    if form.answer is None or form.answer.needed:
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


def _spellings(rows: Rows, spelled: Mapping[tuple[str, str], int], declared: Collection[str]
               ) -> Counter[tuple[str, str]]:
    """Return (label in the label set, text of the cell) → number of cells, where the two differ.

    Args:
        rows: the rows before their labels are read as names in the label set.
        spelled: the same for these labels.
        declared: the label set; empty if it is not known.
    """
    alike = in_other_capitals(rows, declared)
    found = Counter({(alike.get(name, name), text): count for (name, text), count in spelled.items()})
    for name, count in Counter(rows.labels if alike else ()).items():
        if name is not None and name in alike:
            found[alike[name], name] += count - sum(n for (own, _), n in spelled.items() if own == name)
    return +found


class _Reader:
    """A collector of checked rows, which are of the same kind in all files."""

    def __init__(self, finder: LayoutFinder, options: ReadOptions, problems: Problems) -> None:
        self.finder, self.options, self.problems = finder, options, problems
        answer = finder.form.answer
        self.answer_cells = None if answer is None else AnswerCells(answer, problems, options.label_map)
        self.unit_cells = None if finder.unit is None else UnitCells(finder.unit, problems)
        self.files: list[str] = []
        self.file_of, self.lines = array("q"), array("q")
        self.texts: list[str] = []
        self.seconds: list[str | None] = []
        self.messages: list[tuple[Message, ...]] = []
        self.answers: list[Any] = []
        self.otherwise: list[str | None] = []
        self.units: list[str] = []
        self.left_out: dict[str, Counter[str]] = {}
        self.overviews: list[FileOverview] = []

    def add(self, file: str, stream: Iterator[Record]) -> None:
        index, before, taken = len(self.files), len(self.problems), len(self.lines)
        self.files.append(file)
        layout: Layout | None = None
        for line, row in stream:
            if layout is None:
                layout = self.finder.find(file, row)
                if layout is None:
                    return
            elif not row.keys() <= layout.present.keys():
                layout.extend(row)
            if lacks := self._add_row(file, line, layout, row):
                self.left_out.setdefault(file, Counter())[lacks] += 1
                continue
            self.file_of.append(index)
            self.lines.append(line)
        if layout is not None:
            self.finder.check_optional(file, layout)
            self.overviews.append(FileOverview(file, len(self.lines) - taken, tuple(layout.present),
                                               self._taken(layout), self.left_out.get(file, {})))
        if len(self.problems) > before or len(self.lines) > taken:
            return
        if layout is None:
            self.problems.add(shown(file), "the file holds no rows", "Add rows, or remove the file")
        else:
            self.problems.add(shown(file), "no row of the file is complete, so --skip-incomplete leaves out all",
                              "Name the right columns with --column, or complete the rows")

    def _taken(self, layout: Layout) -> dict[str, str]:
        assert self.finder.kind_of_rows is not None, "a layout was found"
        answer = self.finder.form.answer
        names = *self.finder.kind_of_rows[1], "" if answer is None else answer.column, "unit"
        return {name: column for name, column in zip(names, (*layout.texts, layout.answer, layout.unit), strict=True)
                if column is not None and column in layout.present}

    def _add_row(self, file: str, line: int, layout: Layout, row: Mapping[str, Any]) -> str:
        """Check and take a row.

        Returns:
            "" if it is taken; what it lacks, "text" or the name of the column of answers, if it is left out.
        """
        text, second = row.get(layout.texts[0]), None
        turns: tuple[Message, ...] = ()
        faults: list[Fault | None] = []
        if layout.kind == "messages":
            turns, fault = conversation(text)
            faults.append(fault)
            text = ""
        else:
            if fault := text_fault(layout.texts[0], text):
                faults.append(fault)
                text = ""
            elif text == layout.texts[0] and layout.repeats(row):
                faults.append(Fault("the row repeats the names of the columns, as in exports that were joined",
                                    "Remove it, and check that the rows below have the same columns"))
            if len(layout.texts) == 2:
                second = row.get(layout.texts[1])
                if second is not None or layout.needs_second:
                    lacks = "answer" if layout.kind == "completion" else "text"
                    faults.append(text_fault(layout.texts[1], second, lacks))
        skip = self.options.skip_incomplete
        found = [fault for fault in faults if fault is not None]
        if skip and (lacks := next((fault.lacks for fault in found if fault.lacks), "")):
            return lacks
        if self.answer_cells is not None:
            cell = None if layout.answer is None else row.get(layout.answer)
            answer, other = self.answer_cells.read(file, line, cell)
            if skip and self.answer_cells.needed and answer is None and other is None:
                return self.answer_cells.column
            self.answers.append(answer)
            self.otherwise.append(other)
        for fault in found:
            self.problems.add(place(file, line), fault.what, fault.remedy)
        self.texts.append(text)  # type: ignore[arg-type]
        if layout.kind == "messages":
            self.messages.append(turns)
        elif len(layout.texts) == 2:
            self.seconds.append(second)
        if self.unit_cells is not None:
            self.units.append(self.unit_cells.read(file, line, row.get(layout.unit or "")))
        return ""

    @property
    def spelled(self) -> Counter[tuple[str, str]]:
        """(answer, text of the cell) → number of cells, where the two differ."""
        return Counter() if self.answer_cells is None else self.answer_cells.spelled

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
        alone: list[int] = []
        if kind == "pair" and all(second is None for second in self.seconds):
            kind = "text"  # some data sets of single sentences have an empty column sentence2
        elif kind == "pair":
            alone = [row for row, second in enumerate(self.seconds) if second is None]
        if self.options.skip_incomplete:
            for row in alone:
                self.left_out.setdefault(self.files[self.file_of[row]], Counter())["text"] += 1
        else:
            for row in alone:
                self.problems.add(self._where(row), f"{columns[1]} is empty, but not in other rows", COMPLETE)
        check_units(self.units, self._where, self.problems)
        self.problems.raise_any()
        assert kind_of_rows is not None, "a path without a file to read was refused before"
        answers = None if self.answer_cells is None else tuple(self.answers)
        two = labels and any(one is not None for one in self.otherwise)
        rows = Rows(kind=kind, texts=tuple(self.texts),
                    seconds=tuple(self.seconds) if kind in ("pair", "completion") else None,  # type: ignore[arg-type]
                    messages=tuple(self.messages) if kind == "messages" else None,
                    labels=answers if labels else None, values=None if labels else answers,
                    files=tuple(self.files), file_of=np.array(self.file_of, dtype=np.int64),
                    lines=np.array(self.lines, dtype=np.int64),
                    units=None if self.unit_cells is None else tuple(self.units),
                    otherwise=tuple(self.otherwise) if two else None)
        return rows.take(np.delete(np.arange(len(rows)), alone)) if alone else rows

    def remark(self, path: Path | str) -> None:
        """Remark on rows that were left out, and on labels that were replaced, in counts.

        Args:
            path: the path that was read.
        """
        for file, lacking in self.left_out.items():
            counts = " and ".join(f"{count:,} without {'an answer' if lacks == 'answer' else f'a {lacks}'}"
                                  for lacks, count in sorted(lacking.items()))
            self.problems.remark(shown(file), f"of its rows, {counts} are left out", "Complete them to have them used")
        if self.answer_cells is None or not self.options.label_map:
            return
        mapped = self.answer_cells.mapped
        if told := ", ".join(f"{shown(old)} is read as {shown(new)} {mapped[old]:,} times"
                             for old, new in self.options.label_map.items() if mapped[old]):
            self.problems.remark(shown(path), f"the label {told}", "Correct --label-map if that is wrong")
        if lost := [shown(old) for old in self.options.label_map if not mapped[old]]:
            self.problems.remark(shown(path), f"no row has the label {' or '.join(lost)} of --label-map",
                                 "Correct the option, or leave it out")

    def _where(self, row: int) -> str:
        return place(self.files[self.file_of[row]], self.lines[row])
