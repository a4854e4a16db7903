"""From options to a run: the base model, the typed plan, the tensors that start it and how progress is measured."""

from __future__ import annotations

import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import fedlora
from fedlora import data, models
from fedlora.adapters import AdaptedModel, attach, automatic_targets, initial_tensors
from fedlora.models import LoadedModel
from fedlora.plan import ModelRef, RunPlan, Tensors
from fedlora.tasks import Records, Task, task_for
from fedlora_strategies import STRATEGY_CLASSES, FederatedLoRA
from fedlora_strategies.presets import preset

Evaluate = Callable[[Tensors], Mapping[str, float]]


@dataclass(frozen=True)
class BaseModel:
    """The base model's folder and its pinned name, known before anything is loaded."""

    path: Path
    reference: ModelRef


def find_model(options: Namespace) -> BaseModel:
    """Resolve --model and refuse a task that it cannot learn; cheap, so that it comes before a port is bound.

    Raises:
        ValueError: the model cannot be found, or is not made for --task.
    """
    path = models.resolve(options.model, allow_download=options.allow_download)
    models.check_task(path, options.task)
    return BaseModel(path, models.reference(options.model, path))


@dataclass(frozen=True)
class Federation:
    """One run, ready to start: what clients are told, and what the server keeps."""

    plan: RunPlan
    adapted: AdaptedModel
    task: Task
    state: Tensors
    strategy: FederatedLoRA


def prepare(options: Namespace, strategy: str, base: BaseModel, labels: tuple[str, ...], seed: int) -> Federation:
    """Load the base model, attach the adapters, and draw every tensor that is not in the base checkpoint.

    Args:
        options: of fedlora-server or fedlora-simulate; None stands for the preset of (strategy, privacy).
        strategy: one of `fedlora.plan.STRATEGIES`.
        labels: the frozen label set; () for causal language models.
        seed: of the shared tensors.
    Raises:
        ValueError: the options do not fit the model, the task or each other.
    """
    loaded = models.load(base.path, options.task, len(labels))
    plan = make_plan(options, strategy, base.reference, labels, loaded)
    adapted = attach(loaded, family=plan.family, rank=plan.rank, alpha=plan.alpha, targets=plan.targets,
                     train_head=plan.train_head, dropout=plan.dropout)
    init = options.init or preset(strategy, plan.private).init
    state = initial_tensors(adapted, init=init, seed=seed)
    return Federation(plan, adapted, task_for(plan, loaded.tokenizer), state,
                      STRATEGY_CLASSES[strategy](plan, adapted.layout))


def make_plan(options: Namespace, strategy: str, reference: ModelRef, labels: tuple[str, ...],
              loaded: LoadedModel) -> RunPlan:
    """The plan that options and the preset of (strategy, privacy) give together."""
    private = options.privacy == "required"
    chosen = preset(strategy, private)

    def value(name: str):
        given = getattr(options, name)
        return getattr(chosen, name) if given is None else given

    rounds = value("rounds")
    targets = options.targets if options.targets is not None else automatic_targets(loaded.model)
    if options.max_participations and options.max_participations > rounds:
        raise ValueError(f"--max-participations {options.max_participations} is more than the {rounds} rounds of the "
                         "run; lower it, or leave it out for exactly the rounds")
    return RunPlan(
        run_id=secrets.token_hex(8), fedlora_version=fedlora.__version__, strategy=strategy,
        family=STRATEGY_CLASSES[strategy].family, private=private, model=reference, task=options.task, labels=labels,
        max_length=options.max_length, rank=value("rank"), alpha=value("alpha"),
        targets=() if targets == ("none",) else tuple(targets),
        train_head=options.task == "classification" and options.head != "freeze", dropout=options.dropout,
        rounds=rounds, max_participations=options.max_participations or rounds, local_steps=value("local_steps"),
        expected_batch=value("batch_size"), optimizer=value("optimizer"), lr=value("lr"),
        clip_norm=value("clip_norm"), adapter_scale=1.0, head_scale=value("head_scale"),
        weight_by_examples=not private)


def evaluator(federation: Federation, path: Path, columns: Mapping[str, str], *, device: str = "cpu",
              precision: torch.dtype | None = None) -> Evaluate:
    """A function from the state to its figures on held-out rows: accuracy and loss, or loss and perplexity.

    Raises:
        ValueError: the rows cannot be read, have no labels, or labels outside the set.
    """
    rows = data.read(path, federation.plan.task, columns=columns)
    if federation.plan.task == "classification" and rows.labels is None:
        raise ValueError(f"--eval-data {path} has no labels; accuracy needs a label column "
                         "(--column label=NAME names another)")
    records: Records = federation.task.encode(rows)

    def evaluate(state: Tensors) -> Mapping[str, float]:
        federation.adapted.write(state)
        return federation.task.evaluate(federation.adapted.model, records, device=device, dtype=precision)

    return evaluate
