"""The seams' keys, and the cases for tests that run over models, tasks and families."""

from fedlora import registry
from tests.covering import covering
from tests.tiny import DECODERS, KINDS

FAMILIES = registry.keys("fedlora.adapters.families")
TASKS = registry.keys("fedlora.tasks")


def can(kind: str, task: str, *others: object) -> bool:
    """Whether a kind of tiny model can be trained for a task."""
    return task == "classification" or (task == "causal-lm" and kind in DECODERS)


MODELS = covering(KINDS, TASKS, FAMILIES, valid=can)
"""(kind, task, family): every kind of tiny model with every family, and both with every task that can be."""
