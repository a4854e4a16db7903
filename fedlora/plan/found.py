"""Lookup of what a plan names by key, among the installed packages, without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from fedlora import registry

FOUND: Mapping[str, str] = {"family": "fedlora.adapters.families", "task": "fedlora.tasks",
                            "optimizer": "fedlora.training.optimizers",
                            "adjustment": "fedlora.training.adjustments",
                            "mechanism": "fedlora.privacy.mechanisms"}
"""Field of a plan that holds a key → the package whose modules the key chooses from."""


@dataclass(frozen=True)
class TaskFacts:
    """The facts about a task that plans are checked against.

    They are literals in the task's class (`fedlora.task.Task` explains them), so that checking a plan does not need
    PyTorch.
    """

    model_is: str
    has_labels: bool
    has_head: bool


@cache
def task_facts(key: str) -> TaskFacts:
    """Return the facts about an installed task, by its key."""
    said = registry.literals(FOUND["task"], key, "TASK")
    names = ("model_is", "has_labels", "has_head")
    if lacking := [name for name in names if name not in said]:  # inherited, or not a literal
        task = registry.load(FOUND["task"], key).TASK
        said = {**said, **{name: getattr(task, name) for name in lacking}}
    return TaskFacts(str(said["model_is"]), bool(said["has_labels"]), bool(said["has_head"]))
