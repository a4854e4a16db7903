"""Rows of a user's files, as text: what was read, and where each row stands."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("text", "pair", "completion", "messages")
"""What a row is: one text, two texts, a prompt with its completion, or a conversation."""

Message = tuple[str, str]
"""(role, content)."""

_NO_UNIT = ("", "na", "n/a", "<na>", "nan", "nat", "none", "null")
"""What programs write for a missing id. Taken for one, it would make a single person of all who have none."""


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
                                   values=pick(self.values),
                                   file_of=self.file_of[index], lines=self.lines[index])

    def by_file(self) -> list[np.ndarray]:
        """The indices of each file's rows, in the order of `files`."""
        return [np.flatnonzero(self.file_of == i) for i in range(len(self.files))]


def place(file: str, line: int) -> str:
    """How an error names a row."""
    return f"{file}:{line}" if file.lower().endswith((".jsonl", ".csv", ".tsv")) else f"{file}:row {line}"


def spelling(text: str) -> str:
    """The one form of all ways to write a name that look alike: NFKC, without characters of category Cf (zero-width
    blanks, byte-order marks, soft hyphens) and without outer blanks. Capitals are kept."""
    if text.isascii():
        return text.strip()
    composed = unicodedata.normalize("NFKC", text)
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", visible).strip()


def normalize_label(value: object) -> str | None:
    """0, 0.0, "0", "0.0" and " 0 " are all "0"; a name is brought to its one `spelling`; null and "" are None.

    Raises:
        TypeError: the value is neither a whole number nor a string. The message names the type, never the value.
    """
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, str):
        name = spelling(value)
        return re.sub(r"^([+-]?\d+)\.0+$", r"\1", name) or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise TypeError("a fraction" if isinstance(value, float) else f"of type {type(value).__name__}")


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
    name = normalize_label(value)
    return None if name is None or name.casefold() in _NO_UNIT else name


def label_names(rows: Rows) -> tuple[str, ...]:
    """The names of the labels that occur, in `in_order`; () if there are none."""
    return in_order({label for label in rows.labels or () if label is not None})


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels as a classifier's outputs are numbered where nobody says otherwise: by value if all are whole numbers,
    else by name."""
    names = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def labelled_otherwise(rows: Rows, allowed: Collection[str]) -> list[int]:
    """The rows that have a label, and none of the allowed ones."""
    names = {*allowed, None}
    return [row for row, label in enumerate(rows.labels or ()) if label not in names]


def check_labels(rows: Rows, allowed: Sequence[str]) -> None:
    """Raises ValueError for the first label outside the allowed ones, naming file, line and what is allowed."""
    for row in labelled_otherwise(rows, allowed)[:1]:
        raise ValueError(f"{rows.where(row)}: the label is not in the label set. Allowed are: {', '.join(allowed)}. "
                         "Correct the row, or add its label wherever --labels are named")
