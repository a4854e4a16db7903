"""Tasks, one in each file: what a record is, its loss, and how a model is evaluated. The file's name is the key.

Their base class is in `fedlora.task`, and the records that they make are in `fedlora.records`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedlora import registry
from fedlora.data import Overview, ReadOptions, Rows, read_rows, unanswered
from fedlora.plan import RunPlan
from fedlora.records import Records, concatenate
from fedlora.task import Task

__all__ = ["Records", "Task", "concatenate", "read", "task_for", "task_named"]


def task_named(key: str) -> type[Task]:
    """Return the class of the task with a key, such as "causal-lm".

    Raises:
        ValueError: no installed task has this key.
    """
    task: type[Task] = registry.load("fedlora.tasks", key).TASK
    return task


def task_for(run: RunPlan, tokenizer: Any) -> Task:
    """Return the task that a plan describes, with this tokenizer."""
    return task_named(run.task).of(run, tokenizer)


def read(path: Path | str, task: str, *, columns: Mapping[str, str] | None = None, unit: str | None = None,
         allow_download: bool = False, declared: Collection[str] = (), held_out: bool = False,
         options: ReadOptions | None = None, answered: bool = True, overview: Overview | None = None) -> Rows:
    """Read and check the rows of a task's data files, as `fedlora.data.read_rows` does.

    Args:
        path: a file, a folder, or the name of a hub dataset.
        task: key of the task.
        columns: the file's name for a column, where it is not the expected one.
        unit: the file's column with the id of the unit of privacy; None if each row is a unit.
        allow_download: fetch a hub dataset that is not in the hub's cache on this machine.
        declared: the label set, if it is known already.
        held_out: whether the rows are for evaluation, not for training.
        options: what the owner says about the files, such as their separator and other names for labels.
        answered: whether files must have the column of answers, if the task has one.
        overview: takes facts about the files, also if something is wrong with them.

    Raises:
        ValueError: something is wrong. The message gives file, line and remedy of all faults, and never a row's text or
            id.
    """
    kind = task_named(task)
    form = kind.rows if answered else unanswered(kind.rows)
    return read_rows(path, task, form, columns=columns, unit=unit, allow_download=allow_download,
                     labels=kind.has_labels, declared=declared, held_out=held_out, options=options,
                     overview=overview, others={key: task_named(key).rows for key in registry.keys("fedlora.tasks")})
