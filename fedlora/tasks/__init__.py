"""Tasks: what a record is, its loss, and how a model is judged."""

from __future__ import annotations

from typing import Any

from fedlora.plan import RunPlan
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.records import Batch, Records, collate, concatenate
from fedlora.tasks.task import Task

__all__ = ["Batch", "CausalLM", "Classification", "Records", "Task", "collate", "concatenate", "task_for"]


def task_for(run: RunPlan, tokenizer: Any) -> Task:
    """The plan's task."""
    if run.task == "classification":
        return Classification(tokenizer, run.labels, run.max_length)
    return CausalLM(tokenizer, run.max_length)
