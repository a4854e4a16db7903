"""Tasks: what a record is, its loss, and how a model is judged. Each file of this folder is one, found by its name.

What all tasks share is in `fedlora.task`, and the records that they make are in `fedlora.records`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedlora import registry
from fedlora.data import Rows, read_rows
from fedlora.plan import RunPlan
from fedlora.records import Records, concatenate
from fedlora.task import Task

__all__ = ["Records", "Task", "concatenate", "read", "task_for", "task_named"]


def task_named(key: str) -> type[Task]:
    """The task behind a key, as in "causal-lm".

    Raises:
        ValueError: none is called so.
    """
    return registry.load("fedlora.tasks", key).TASK


def task_for(run: RunPlan, tokenizer: Any) -> Task:
    """The plan's task."""
    return task_named(run.task).of(run, tokenizer)


def read(path: Path | str, task: str, *, columns: Mapping[str, str] | None = None, unit: str | None = None,
         allow_download: bool = False, declared: Collection[str] = (), held_out: bool = False) -> Rows:
    """The rows of a task's files; see `fedlora.data.read_rows`, also for what it raises.

    Args:
        task: its key.
    """
    kind = task_named(task)
    return read_rows(path, task, kind.rows, columns=columns, unit=unit, allow_download=allow_download,
                     labels=kind.has_labels, declared=declared, held_out=held_out,
                     others={key: task_named(key).rows for key in registry.keys("fedlora.tasks")})
