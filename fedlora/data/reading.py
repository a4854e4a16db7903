"""From a path to `Rows`: find the files, find the columns that a task names, check every row."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data.formats import SUFFIXES, Record, hub_records, records, show_columns
from fedlora.data.rows import Message, Rows, normalize_unit, place

KindOfRows = tuple[str, tuple[str, ...]]
"""One of `fedlora.data.rows.KINDS`, and the columns that hold it."""


@dataclass(frozen=True)
class Answer:
    """The column with what a model is to say of a text.

    Attributes:
        column: its name, where --column gives no other.
        parse: a cell's value as the task takes it, None where there is none. It raises TypeError for any other; the
            message says what the value is ("a fraction"), and never holds it.
        remedy: how to write it, for the owner of a cell that does not parse.
    """

    column: str
    parse: Callable[[object], Any]
    remedy: str


@dataclass(frozen=True)
class RowFormat:
    """What the files of a task hold.

    Attributes:
        kinds: of rows, each with its columns; the first whose columns are there is taken.
        answer: a column beside them; None where the rows themselves hold what is learned.
        otherwise: ends the error about columns that are not there.
    """

    kinds: tuple[KindOfRows, ...]
    answer: Answer | None = None
    otherwise: str = ""


log = logging.getLogger(__name__)


def read_rows(path: Path | str, task: str, form: RowFormat, *, columns: Mapping[str, str] | None = None,
              unit: str | None = None, allow_download: bool = False, labels: bool = False,
              usual: Collection[str] = ()) -> Rows:
    """Read and check all rows of a file, a folder (its files in the order of their names) or a hub dataset.

    Files of other kinds in a folder, and folders in it, are not read; a warning names them.

    Args:
        path: a .jsonl, .csv, .tsv or .parquet file, a folder of such, or "org/dataset[/config][:split]".
        task, form: what they are for, as errors call it, and what they hold for that.
        columns: the file's name for a column, where it is not the expected one: {"text": "note"}.
        unit: the file's column that names the person (or other unit of privacy) a row belongs to, for `Rows.units`;
            None if each row is a unit of its own. An id means the same in all files of a folder.
        allow_download: fetch a hub dataset that is not in the hub's cache on this machine.
        labels: whether the answers are names of classes: they become `Rows.labels`, which the label set of a run is
            held against, and which a client may announce. Others become `Rows.values`.
        usual: further names of columns, by which a header is known for one where columns are missing.
    Raises:
        ValueError: with file, line and remedy, never with a row's text or id.
    """
    names = dict(columns or {})
    known = column_names(form)
    if unknown := sorted(set(names) - known):
        raise ValueError(f"--column {unknown[0]}=… names no column of {task}. Those are: "
                         f"{', '.join(sorted(known))}")

    reader = _Reader(task, form, names, unit, known.union(usual))
    wanted = {names.get(name, name) for name in known} | ({unit} if unit else set())
    for file, stream in _sources(path, wanted, allow_download):
        reader.add(file, stream)
    return reader.rows(labels)


def column_names(form: RowFormat) -> set[str]:
    """All columns that rows can have, but for that of the unit."""
    return {name for _, columns in form.kinds for name in columns} | ({form.answer.column} if form.answer else set())


def _sources(path: Path | str, wanted: set[str], allow_download: bool) -> Iterator[tuple[str, Iterator[Record]]]:
    local = Path(path).expanduser()
    accepted = ", ".join(SUFFIXES)
    if local.is_dir():
        files = sorted(f for f in local.iterdir()
                       if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())
        if not files:
            raise ValueError(f"{path} is a folder without a file that ends in {accepted}. "
                             "Put the data there, or name another folder")
        if left := _left_out(local):
            log.warning("%s: left out: %s%s. Files are read that end in %s and lie in the folder itself", path,
                        ", ".join(left[:3]), f" and {len(left) - 3} more" if len(left) > 3 else "", accepted)
        yield from ((str(f), records(f, wanted)) for f in files)
    elif local.exists():
        if local.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} ends in {local.suffix or 'no suffix'!r}. Give a file that ends in {accepted}")
        yield str(path), records(local, wanted)
    else:
        check_there(path)
        yield str(path), hub_records(str(path), allow_download=allow_download)


def check_there(path: Path | str) -> None:
    """Raises ValueError where `path` is neither a file or folder nor a name that the hub could know."""
    if not Path(path).expanduser().exists() and not _is_hub_name(str(path)):
        raise ValueError(f"{path} does not exist. Name a file that ends in {', '.join(SUFFIXES)}, or a folder of such "
                         "files")


def _left_out(folder: Path) -> list[str]:
    """What a folder holds that its owner may take for data, and that is not read: other files, folders of data."""
    def data(path: Path) -> bool:
        return path.suffix.lower() in SUFFIXES

    return [f"{one.name}/" if one.is_dir() else one.name for one in sorted(folder.iterdir())
            if not one.name.startswith(".") and (any(map(data, one.rglob("*"))) if one.is_dir() else not data(one))]


def _is_hub_name(name: str) -> bool:
    """Whether a name that is no local path may be sent to the hub; a mistyped local path must not be."""
    part = r"[A-Za-z0-9][\w.-]*"
    return (re.fullmatch(rf"{part}/{part}(/{part})?(:\w+)?", name) is not None
            and not name.endswith(SUFFIXES) and not Path(name.split("/")[0]).exists())


class _Reader:
    """Collects checked rows; one kind for all files."""

    def __init__(self, task: str, form: RowFormat, names: Mapping[str, str], unit: str | None,
                 usual: Collection[str]) -> None:
        self.task, self.form, self.answer = task, form, form.answer
        self.names = names
        self.usual = usual
        self.unit = unit
        self.kind_of_rows: KindOfRows | None = None
        self.files: list[str] = []
        self.file_of, self.lines = array("q"), array("q")
        self.texts: list[str] = []
        self.seconds: list[str | None] = []
        self.messages: list[tuple[Message, ...]] = []
        self.answers: list[Any] = []
        self.units: list[str] = []

    def add(self, file: str, stream: Iterator[Record]) -> None:
        self.files.append(file)
        kind_of_rows: KindOfRows | None = None
        present: dict[str, None] = {}
        for line, row in stream:
            if kind_of_rows is None:
                kind_of_rows = self._find_layout(file, tuple(row))
            present.update(dict.fromkeys(row))
            self._add_row(place(file, line), kind_of_rows, row)
            self.file_of.append(len(self.files) - 1)
            self.lines.append(line)
        if kind_of_rows is None:
            raise ValueError(f"{file} holds no rows. Add some, or take the file away")
        self._check_optional(file, kind_of_rows, tuple(present))

    def _find_layout(self, file: str, present: tuple[str, ...]) -> KindOfRows:
        """The first kind that has all columns which --column names, and whose own are in a file's first row, but for
        those that a row may lack."""
        beside = {self.answer.column} if self.answer else set()
        found = next((one for one in self.form.kinds
                      if self.names.keys() - beside <= set(one[1])
                      and all(self.names.get(n, n) in present for n in _required(one))), None)
        if found is None:
            raise self._no_layout(file, present)
        if self.unit is not None and self.unit not in present:
            raise ValueError(f"{place(file, 1)}: there is no column {self.unit}; {self._columns(file, present)}. "
                             "Name yours with --privacy-unit column:NAME")
        if self.kind_of_rows is not None and self.kind_of_rows != found:
            raise ValueError(f"{file} has the columns {' + '.join(found[1])}, {self.files[0]} has "
                             f"{' + '.join(self.kind_of_rows[1])}. Use the same columns in all files of a folder")
        self.kind_of_rows = found
        return found

    def _no_layout(self, file: str, present: tuple[str, ...]) -> ValueError:
        wanted = ", or ".join(" + ".join(self.names.get(n, n) for n in cols) for _, cols in self.form.kinds)
        alone = [cols[0] for kind, cols in self.form.kinds if kind == "text"]
        example = alone[0] if alone else self.form.kinds[0][1][0]
        return ValueError(f"{place(file, 1)}: {self.task} needs the columns {wanted}; "
                          f"{self._columns(file, present)}. "
                          f"Name yours with --column {example}=NAME{self.form.otherwise}")

    def _columns(self, file: str, present: tuple[str, ...]) -> str:
        mine = {*self.names.values()} | ({self.unit} if self.unit else set())
        return show_columns(file, present, mine.union(self.usual))

    def _check_optional(self, file: str, kind_of_rows: KindOfRows, present: tuple[str, ...]) -> None:
        """A row may lack its answer or the second of a pair; a file whose rows all do has no such column."""
        if any(self.names.get(name, name) not in present for name in kind_of_rows[1]):
            raise self._no_layout(file, present)
        if self.answer is None:
            return
        column = self.names.get(self.answer.column, self.answer.column)
        if column not in present:
            raise ValueError(f"{place(file, 1)}: there is no column {column}; {self._columns(file, present)}. "
                             f"Name yours with --column {self.answer.column}=NAME")

    def _add_row(self, where: str, kind_of_rows: KindOfRows, row: Mapping[str, Any]) -> None:
        kind, columns = kind_of_rows
        if kind == "messages":
            self.texts.append("")
            self.messages.append(_conversation(where, row.get(self.names.get(columns[0], columns[0]))))
        else:
            values = [self._text(where, name, row, required=name in _required(kind_of_rows)) for name in columns]
            self.texts.append(values[0] or "")
            if len(values) == 2:
                self.seconds.append(values[1])
        if self.answer is not None:
            name = self.answer.column
            try:
                answer = self.answer.parse(row.get(self.names.get(name, name)))
            except TypeError as error:
                raise ValueError(f"{where}: the {name} is {error}. {self.answer.remedy}") from None
            self.answers.append(_whole(where, f"the {name}", answer) if isinstance(answer, str) else answer)
        if self.unit is not None:
            self.units.append(_unit(where, self.unit, row.get(self.unit)))

    def _text(self, where: str, name: str, row: Mapping[str, Any], *, required: bool) -> str | None:
        column = self.names.get(name, name)
        value = row.get(column)
        if value is None and not required:
            return None
        return _checked(where, column, value)

    def rows(self, labels: bool) -> Rows:
        assert self.kind_of_rows is not None
        kind, columns = self.kind_of_rows
        if kind == "pair" and all(second is None for second in self.seconds):
            kind = "text"  # GLUE's single-sentence tasks keep an empty sentence2
        elif None in self.seconds:
            row = self.seconds.index(None)
            raise ValueError(f"{place(self.files[self.file_of[row]], self.lines[row])}: {columns[1]} is empty, but not "
                             "in other rows. Fill it, or remove the row")
        answers = None if self.answer is None else tuple(self.answers)
        return Rows(kind=kind, texts=tuple(self.texts),
                    seconds=tuple(self.seconds) if kind in ("pair", "completion") else None,  # type: ignore[arg-type]
                    messages=tuple(self.messages) if kind == "messages" else None,
                    labels=answers if labels else None, values=None if labels else answers,
                    files=tuple(self.files), file_of=np.array(self.file_of, dtype=np.int64),
                    lines=np.array(self.lines, dtype=np.int64), units=None if self.unit is None else tuple(self.units))


def _required(kind_of_rows: KindOfRows) -> tuple[str, ...]:
    """The columns that each row has; the second of a pair may be empty or absent."""
    kind, columns = kind_of_rows
    return columns[:1] if kind == "pair" else columns


def _unit(where: str, column: str, value: Any) -> str:
    try:
        name = normalize_unit(value)
    except TypeError as error:
        raise ValueError(f"{where}: the {column} is {error}. Write it as a whole number or a string") from None
    if name is None:
        raise ValueError(f"{where}: {column} is missing or empty, so it is not known whose row this is. Fill it, or "
                         "remove the row")
    return _whole(where, column, name)


def _checked(where: str, column: str, value: Any) -> str:
    if value is None:
        raise ValueError(f"{where}: {column} is missing or empty. Fill it, or remove the row")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} is of type {type(value).__name__}. It must be a string")
    if not value.strip():
        raise ValueError(f"{where}: {column} is empty. Fill it, or remove the row")
    return _whole(where, column, value)


def _whole(where: str, what: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {what} holds half of a Unicode surrogate pair (an escape like \\ud83d alone). "
                         "Write the whole character") from None
    return value


def _conversation(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: messages is not a list of messages. "
                         'Write [{"role": "user", "content": …}, {"role": "assistant", "content": …}]')
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{where}: a message has no role. Give each a role and a content")
        turns.append((_whole(where, "role of a message", turn["role"]),
                      _checked(where, "content of a message", turn.get("content"))))
    if all(role != "assistant" for role, _ in turns):
        raise ValueError(f"{where}: no message has the role assistant, so there is nothing to learn from. "
                         "Add the answer, or remove the row")
    return tuple(turns)
