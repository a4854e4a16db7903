"""What a plan names by a key, looked up in what is installed, and what is known of it without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from fedlora import registry

FOUND: Mapping[str, str] = {"family": "fedlora.adapters.families", "task": "fedlora.tasks",
                            "optimizer": "fedlora.training.optimizers",
                            "adjustment": "fedlora.training.adjustments"}
"""Fields that are a key each → the package whose files they name."""


@dataclass(frozen=True)
class TaskFacts:
    """What plans are held against. A task's class says it in literals, see `fedlora.task.Task`; whoever only passes a
    plan on needs no PyTorch for it.
    """

    model_is: str
    has_labels: bool
    has_head: bool


@cache
def task_facts(key: str) -> TaskFacts:
    """Those of a task that is installed."""
    said = registry.literals(FOUND["task"], key, "TASK")
    names = ("model_is", "has_labels", "has_head")
    if lacking := [name for name in names if name not in said]:  # inherited, or computed
        task = registry.load(FOUND["task"], key).TASK
        said = {**said, **{name: getattr(task, name) for name in lacking}}
    return TaskFacts(str(said["model_is"]), bool(said["has_labels"]), bool(said["has_head"]))
