"""A usual plan, by which a data holder learns what a run may cost before a coordinator has sent a kit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import fedlora
from fedlora.adapters import all_targets, automatic_targets
from fedlora.config.client import CheckConfig
from fedlora.kit import NO_RUN
from fedlora.models import LoadedModel
from fedlora.plan import ModelRef, RunPlan, task_facts
from fedlora.plan.usual import MAX_LENGTH, USUAL

NO_MODEL = ModelRef("not-chosen", *("0" * 64,) * 3)
"""Stands for the base model while it is not known."""


def usual_plan(options: CheckConfig) -> RunPlan:
    """Return a plan with the usual values, or those of the options. Its base model and its labels are still open.

    Args:
        options: the options of `fedlora-client check`.

    Raises:
        ValueError: the values contradict each other or are out of range.
    """
    private = options.epsilon != math.inf
    usual = USUAL[private]
    rounds = options.rounds or usual.rounds
    return RunPlan(
        NO_RUN, fedlora.__version__, "usual", "frozen-a", private, NO_MODEL, options.task, (),
        options.max_length or MAX_LENGTH, rank=2 if private else 8, alpha=8.0, targets=("query",),
        train_head=task_facts(options.task).has_head, dropout=0.0, rounds=rounds, max_participations=rounds,
        local_steps=options.local_steps or usual.local_steps, expected_batch=options.batch_size or usual.expected_batch,
        optimizer="adamw", lr=1e-2, clip_norm=1.0, adapter_scale=1.0, head_scale=1.0, weight_by_examples=not private)


def on_model(plan: RunPlan, loaded: LoadedModel) -> RunPlan:
    """Return a usual plan with the layers of a base model that are usually adapted.

    Args:
        plan: the plan.
        loaded: the base model.

    Raises:
        ValueError: no layers of such a model are known.
    """
    targets = automatic_targets(loaded.model) if plan.private else all_targets(loaded.model, private=False)
    return dataclasses.replace(plan, targets=targets)


def check_against(plan: RunPlan, options: CheckConfig, given: Collection[str]) -> None:
    """Check that the given options are what the plan of a kit says.

    Args:
        plan: the kit's plan.
        options: the options of `fedlora-client check`.
        given: names of the options that are given.

    Raises:
        ValueError: one is not.
    """
    for name, field in {"max_length": "max_length", "rounds": "rounds", "local_steps": "local_steps",
                        "batch_size": "expected_batch"}.items():
        value, planned = getattr(options, name), getattr(plan, field)
        if name in given and value != planned:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not the kit's, {planned}; leave the option out")
