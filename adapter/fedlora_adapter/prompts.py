"""Public prompts: texts without labels, from a file as for training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora import tasks
from fedlora.data import RowFormat, Rows, read_rows

_FORM = RowFormat((("messages", ("messages",)), ("text", ("prompt",)), ("text", ("text",))))
"""Columns of a language model's prompts."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file.

    Attributes:
        rows: the prompts. Those for a classifier have no labels; a conversation ends before its last answer.
        file: the file's name, without its folder.
        sha256: hash of the file.
    """

    rows: Rows
    file: str
    sha256: str


def read_prompts(file: Path, task: str, columns: Mapping[str, str]) -> Prompts:
    """Read the prompts of a file.

    Args:
        file: the file.
        task: key of the task.
        columns: the file's names of columns.

    Raises:
        ValueError: the file cannot be read, or a conversation begins with the answer.
    """
    if not file.is_file():
        raise ValueError(f"--prompts {file}: there is no such file. Name a .jsonl, .csv, .tsv, .parquet or .xlsx file "
                         "of public texts")
    if tasks.task_named(task).has_labels:
        rows = tasks.read(file, task, columns=columns, held_out=True, answered=False)
        rows = dataclasses.replace(rows, labels=(None,) * len(rows), otherwise=None)
    else:
        rows = read_rows(file, task, _FORM, columns=columns, held_out=True)
    if rows.messages is not None:
        rows = dataclasses.replace(rows, messages=tuple(_asked(rows, row) for row in range(len(rows))))
    with file.open("rb") as opened:
        return Prompts(rows, file.name, hashlib.file_digest(opened, "sha256").hexdigest())


def _asked(rows: Rows, row: int) -> tuple[tuple[str, str], ...]:
    assert rows.messages is not None
    turns = rows.messages[row]
    last = max((place for place, (role, _) in enumerate(turns) if role == "assistant"), default=len(turns))
    if not last:
        raise ValueError(f"{rows.where(row)}: the conversation begins with the answer, so there is nothing to answer; "
                         "put the question before it")
    return turns[:last]
