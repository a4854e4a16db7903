"""The keys of models, tasks and families, and the combinations of them that tests run."""

from fedlora import registry
from tests.covering import covering
from tests.tiny import DECODERS, KINDS

FAMILIES = registry.keys("fedlora.adapters.families")
TASKS = registry.keys("fedlora.tasks")


def can(kind: str, task: str, *others: object) -> bool:
    """Return whether a kind of tiny model can be trained for a task."""
    return task == "classification" or (task == "causal-lm" and kind in DECODERS)


def rank_of(family: str) -> int:
    """Return the rank of a family's adapters in tests of all families: `bat` needs one that divides every layer."""
    return 4 if family == "bat" else 3


MODELS = covering(KINDS, TASKS, FAMILIES, valid=can)
"""(kind, task, family) such that every two of their values meet, where the model can be trained for the task."""
