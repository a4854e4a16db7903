"""Rows read from a user's files, the place of each row in its file, and the normal form of labels and ids."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np

from fedlora.data.problems import FIRST, places

T = TypeVar("T")

KINDS = ("text", "pair", "completion", "messages")
"""Kinds of rows: one text, two texts, a prompt with its completion, or a conversation."""

Message = tuple[str, str]
"""(role, content)."""

MISSING = frozenset(("", "na", "n/a", "n.a.", "<na>", "#n/a", "nan", "-nan", "nat", "none", "null"))
"""Words that programs write for a missing value, in small letters.

    column  meaning of such a word
    label   no label, unless the label set contains the word, which may be the name of a class (`labelled_by`)
    unit    no id, so the row is refused; as an id, it would make one person of all people without an id
    text    an ordinary text, because people write "None" and "NA" too; a remark says how many there are

Capitals, outer blanks and invisible characters make no difference (`is_missing`).
"""


class Workbook(str):
    """The path of a workbook, together with the sheet that is read."""

    sheet: str

    @classmethod
    def of(cls, path: str, sheet: str) -> Workbook:
        """Return the path together with the name of a sheet."""
        made = cls(path)
        made.sheet = sheet
        return made


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the files' names and lines.

    Attributes:
        kind: one of `KINDS`.
        texts: for each row the text, the first text of a pair, or the prompt; "" for each conversation.
        seconds: for each row the second text of a pair, or the completion; None for other kinds.
        messages: for each row the conversation; None for other kinds.
        labels: for each row the normalised label name, or None if it has no label; None for tasks without labels.
        files: the files read, in order.
        file_of: [rows] index into `files`.
        lines: [rows] number of the line on which each row begins, counted from 1 (in a parquet file, of the row).
        units: for each row the normalised id of the person (or other unit of privacy) that it belongs to; None if each
            row is its own unit.
        values: for each row the answer as its task parses it, or None if it has none, for answers that are not names of
            classes; None for other tasks.
        otherwise: for each row the other reading of its label, or None. The other reading is a word that can also stand
            for a missing value, or the number of a class that has a name. It is used if the run's label set contains
            it, but not what `labels` says (`labelled_by`). None if no label has two readings.
    """

    kind: str
    texts: tuple[str, ...]
    seconds: tuple[str, ...] | None
    messages: tuple[tuple[Message, ...], ...] | None
    labels: tuple[str | None, ...] | None
    files: tuple[str, ...]
    file_of: np.ndarray
    lines: np.ndarray
    units: tuple[str, ...] | None = None
    values: tuple[Any, ...] | None = None
    otherwise: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        """Return the place of a row as "file:line", or as "file:row number" for formats without lines."""
        return place(self.files[self.file_of[row]], int(self.lines[row]))

    @property
    def answers(self) -> tuple[Any, ...] | None:
        """The answer of each row, or None if it has none; None for tasks whose rows themselves hold what is learned."""
        return self.values if self.labels is None else self.labels

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Return the rows at `indices`, in that order."""
        def pick(column: tuple[T, ...] | None) -> tuple[T, ...] | None:
            return None if column is None else tuple(column[i] for i in indices)

        index = np.asarray(indices, dtype=np.int64)
        return dataclasses.replace(self, texts=tuple(self.texts[i] for i in indices), seconds=pick(self.seconds),
                                   messages=pick(self.messages), labels=pick(self.labels), units=pick(self.units),
                                   values=pick(self.values), otherwise=pick(self.otherwise),
                                   file_of=self.file_of[index], lines=self.lines[index])

    def by_file(self) -> list[np.ndarray]:
        """Return the indices of each file's rows, in the order of `files`."""
        return [np.flatnonzero(self.file_of == i) for i in range(len(self.files))]


def place(file: str, line: int) -> str:
    """Return a row's place as messages show it: "file:line", or "file:row number" for formats without lines."""
    sheet = f", sheet {shown(file.sheet)}" if isinstance(file, Workbook) else ""
    lines = file.lower().removesuffix(".gz").endswith((".jsonl", ".csv", ".tsv"))
    return f"{shown(file)}{sheet}:{line}" if lines else f"{shown(file)}{sheet}:row {line}"


def is_table(file: str) -> bool:
    """Return whether a file has its columns' names in its first row, by its name."""
    return file.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".xlsx"))


def shown(name: object) -> str:
    """Return a path or a column's name as messages show it.

    Characters that cannot be printed, or that would move a terminal's cursor, are written as escapes.
    """
    text = str(name)
    return text if text.isprintable() else "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def spelling(text: str) -> str:
    """Return the normal form of a name, in which all spellings that look alike are equal.

    It is Unicode's NFKC form, without characters of category Cf (zero-width blanks, byte-order marks, soft hyphens) and
    without outer blanks. Capitals are kept.
    """
    if text.isascii():
        return text.strip()
    composed = unicodedata.normalize("NFKC", text)
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", visible).strip()


def normalize_label(value: object) -> str | None:
    """Return the normal form of a label, or None if the cell is empty or null.

    0, 0.0, "0", "0.0" and " 0 " all become "0". A name becomes its `spelling`. A truth value becomes "True" or "False",
    as programs write it into CSV files.

    Raises:
        TypeError: the value is neither a whole number nor a string. The message names the type, never the value.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        name = spelling(value)
        return re.sub(r"^([+-]?\d+)\.0+$", r"\1", name) or None
    if isinstance(value, int):  # truth values included
        return str(value)
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    raise TypeError("a fraction" if isinstance(value, (float, Decimal)) else f"of type {type(value).__name__}")


def is_missing(value: object) -> bool:
    """Return whether a cell holds no value, or a word that stands for a missing value."""
    return value is None or value != value or (isinstance(value, str) and spelling(value).casefold() in MISSING)


def normalize_unit(value: object) -> str | None:
    """Return the normal form of a unit's id, or None if the cell is empty or holds a word for a missing value.

    7, 7.0 and " 7 " are the same id, as for `normalize_label`. If two spellings of one person's id counted as two
    units, each would only be protected by itself. Leading zeros and capitals are kept, because codes may differ in
    them.

    Raises:
        TypeError: the value is neither a whole number nor a string, or a number too large to be exact. The message
            never holds the value.
    """
    if isinstance(value, float) and abs(value) >= 2**53:
        raise TypeError("a number too large to be exact")
    if isinstance(value, bool):
        raise TypeError("of type bool")
    return None if is_missing(value) else normalize_label(value)


def label_names(rows: Rows) -> tuple[str, ...]:
    """Return the names of all labels that occur, in the order of `in_order`."""
    return in_order({label for label in rows.labels or () if label is not None})


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels by value if all are whole numbers, else by name.

    This is the order of a classifier's outputs unless --labels gives another.
    """
    names = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def labelled_by(rows: Rows, labels: Collection[str]) -> Rows:
    """Return the rows with each label in the reading that a label set contains.

    If the set lacks a label but contains its other reading (`Rows.otherwise`), the other reading is used. If it lacks
    both, but has exactly one name that differs from the label only in capitals, the label is read as that name. Each
    label is read by itself, whatever the other rows hold.
    """
    if rows.labels is None:
        return rows
    alike = in_other_capitals(rows, labels)
    if rows.otherwise is None:
        return dataclasses.replace(rows, labels=tuple(alike.get(one, one) for one in rows.labels)) if alike else rows
    both = zip(rows.labels, rows.otherwise, strict=True)
    return dataclasses.replace(rows, otherwise=None, labels=tuple(
        other if one not in labels and other in labels else alike.get(one, one) for one, other in both))


def in_other_capitals(rows: Rows, labels: Collection[str]) -> dict[str | None, str]:
    """Return the labels that a label set lacks, each with the only name in the set that differs just in capitals.

    Args:
        rows: the rows.
        labels: the label set. Labels that differ from two of its names just in capitals are not returned.
    """
    names: dict[str, list[str]] = {}
    for name in labels:
        names.setdefault(name.casefold(), []).append(name)
    lacking = set(rows.labels or ()) - set(labels) - {None}
    return {one: found[0] for one in lacking if one is not None and len(found := names.get(one.casefold(), [])) == 1}


def rows_in_other_capitals(rows: Rows, labels: Collection[str]) -> list[int]:
    """Return the indices of the rows whose label `labelled_by` reads as a name in other capitals."""
    alike = in_other_capitals(rows, labels)
    if not alike:
        return []
    read = labelled_by(rows, labels).labels or ()
    return [row for row, (one, name) in enumerate(zip(rows.labels or (), read, strict=True))
            if one is not None and alike.get(one) == name]


def labelled_otherwise(rows: Rows, allowed: Collection[str]) -> list[int]:
    """Return the indices of the rows whose label is not among the allowed ones. Rows without a label do not count."""
    names = {*allowed, None}
    return [row for row, label in enumerate(labelled_by(rows, allowed).labels or ()) if label not in names]


def check_labels(rows: Rows, allowed: Sequence[str]) -> None:
    """Check that all labels are among the allowed ones.

    Raises:
        ValueError: some are not. The message names file and line of the first ones, and the allowed labels.
    """
    wrong = labelled_otherwise(rows, allowed)
    if wrong:
        raise ValueError(f"{places([rows.where(row) for row in wrong[:FIRST]], len(wrong))}: the label is not in the "
                         f"label set. Allowed are: {', '.join(allowed)}. Correct the row, give its label another name "
                         "with --label-map, or add it wherever --labels is given")
