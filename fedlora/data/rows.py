"""Rows of a user's files, as text: what was read, and where each row stands."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from fedlora.data.problems import FIRST, places

KINDS = ("text", "pair", "completion", "messages")
"""What a row is: one text, two texts, a prompt with its completion, or a conversation."""

Message = tuple[str, str]
"""(role, content)."""

MISSING = frozenset(("", "na", "n/a", "n.a.", "<na>", "#n/a", "nan", "-nan", "nat", "none", "null"))
"""What programs write where a value is missing, in small letters.

column      such a word is
label       no label, unless the label set has the word: it may be the name of a class (`labelled_by`)
unit        no id: the row is refused. Taken for one, it would make a single person of all who have none
text        a text like others, since people write "None" and "NA" too; how many there are is said
"""


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the files' names and lines.

    Attributes:
        kind: one of `KINDS`.
        texts: the text, the first of a pair, or the prompt; "" for each conversation.
        seconds: the second of a pair or the completion, else None.
        messages: the conversations, else None.
        labels: normalised label names, None where a row has no label; None for tasks without labels.
        values: answers that are no names of classes, as their task reads them, None where a row has none; None for
            tasks without such.
        otherwise: what a label is where the run's label set has that, and not what `labels` says: a word that stands
            for a missing value, or the number of a class that has a name. None where no label has two readings.
        files: the files read, in order.
        file_of: [rows] index into `files`.
        lines: [rows] the line on which a row begins, counted from 1 (in a parquet file, the row's number).
        units: the normalised id of the person (or other unit of privacy) that each row belongs to; None where each row
            is a unit of its own.
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
        """"file:line" of a row; for formats without lines, "file:row number"."""
        return place(self.files[self.file_of[row]], int(self.lines[row]))

    @property
    def answers(self) -> tuple[Any, ...] | None:
        """What is to be said of each row, None where that is not known; None where the rows themselves hold it."""
        return self.values if self.labels is None else self.labels

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        def pick(column):
            return None if column is None else tuple(column[i] for i in indices)

        index = np.asarray(indices, dtype=np.int64)
        return dataclasses.replace(self, texts=pick(self.texts), seconds=pick(self.seconds),
                                   messages=pick(self.messages), labels=pick(self.labels), units=pick(self.units),
                                   values=pick(self.values), otherwise=pick(self.otherwise),
                                   file_of=self.file_of[index], lines=self.lines[index])

    def by_file(self) -> list[np.ndarray]:
        """The indices of each file's rows, in the order of `files`."""
        return [np.flatnonzero(self.file_of == i) for i in range(len(self.files))]


def place(file: str, line: int) -> str:
    """How an error names a row."""
    return f"{shown(file)}:{line}" if file.lower().endswith((".jsonl", ".csv", ".tsv")) else f"{shown(file)}:row {line}"


def shown(name: object) -> str:
    """A path or a column's name as a message has it: what would move a terminal's cursor, or cannot be printed, is
    written as an escape.
    """
    text = str(name)
    return text if text.isprintable() else "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def spelling(text: str) -> str:
    """The one form of all ways to write a name that look alike: NFKC, without characters of category Cf (zero-width
    blanks, byte-order marks, soft hyphens) and without outer blanks. Capitals are kept.
    """
    if text.isascii():
        return text.strip()
    composed = unicodedata.normalize("NFKC", text)
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", visible).strip()


def normalize_label(value: object) -> str | None:
    """0, 0.0, "0", "0.0" and " 0 " are all "0"; a name is brought to its one `spelling`; null and "" are None.

    A truth value is "True" or "False", as programs write it into CSV.

    Raises:
        TypeError: the value is neither a whole number nor a string. The message names the type, never the value.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        name = spelling(value)
        return re.sub(r"^([+-]?\d+)\.0+$", r"\1", name) or None
    if isinstance(value, int):  # a truth value is one
        return str(value)
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    raise TypeError("a fraction" if isinstance(value, (float, Decimal)) else f"of type {type(value).__name__}")


def is_missing(value: object) -> bool:
    """Whether a cell holds no value, or a word that stands for none."""
    return value is None or value != value or (isinstance(value, str) and spelling(value).casefold() in MISSING)


def normalize_unit(value: object) -> str | None:
    """As `normalize_label`: 7, 7.0 and " 7 " are one id. None where there is no id, or a word that stands for none.

    Two ways to write one person's id would make two units of that person, each protected on its own only. Leading zeros
    and capitals are kept, since codes may differ in them.

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
    """The names of the labels that occur, in `in_order`; () if there are none."""
    return in_order({label for label in rows.labels or () if label is not None})


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels as a classifier's outputs are numbered where nobody says otherwise: by value if all are whole numbers,
    else by name.
    """
    names = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def labelled_by(rows: Rows, labels: Collection[str]) -> Rows:
    """The rows as a label set has them read: a label that it lacks, and whose other reading it has, is the latter."""
    if rows.labels is None or rows.otherwise is None:
        return rows
    both = zip(rows.labels, rows.otherwise, strict=True)
    return dataclasses.replace(rows, otherwise=None, labels=tuple(
        other if one not in labels and other in labels else one for one, other in both))


def labelled_otherwise(rows: Rows, allowed: Collection[str]) -> list[int]:
    """The rows that have a label, and none of the allowed ones."""
    names = {*allowed, None}
    return [row for row, label in enumerate(labelled_by(rows, allowed).labels or ()) if label not in names]


def check_labels(rows: Rows, allowed: Sequence[str]) -> None:
    """Raises ValueError for labels outside the allowed ones, naming file and line of the first, and what is allowed."""
    wrong = labelled_otherwise(rows, allowed)
    if wrong:
        raise ValueError(f"{places([rows.where(row) for row in wrong[:FIRST]], len(wrong))}: the label is not in the "
                         f"label set. Allowed are: {', '.join(allowed)}. Correct the row, or add its label wherever "
                         "--labels are named")
