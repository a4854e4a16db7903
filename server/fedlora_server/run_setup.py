"""From options to a run: the base model, the typed plan, the tensors that start it and how progress is measured."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fedlora
from fedlora import data, models
from fedlora.adapters import AdaptedModel, all_targets, attach_planned, automatic_targets, initial_tensors
from fedlora.adapters.public_rows import PREFIX, public_start, read_public
from fedlora.adapters.sketches import PRIVATE_START
from fedlora.config import RunConfig, options_of
from fedlora.data import Rows
from fedlora.models import LoadedModel
from fedlora.plan import PROTOCOL, ModelRef, RunPlan, Tensors
from fedlora.tasks import Records, Task, read, task_for, task_named
from fedlora.training import Trainer
from fedlora.training.adjustments import check_adjustment
from fedlora_strategies import STRATEGY_CLASSES, FederatedLoRA
from fedlora_strategies.presets import Preset, preset
from fedlora_strategies.private_start import PrivateStart

ANY_LABELS = ("0", "1")
"""Stands for the labels that clients will announce, so that everything else can be tried before they come."""

Evaluate = Callable[[Tensors], Mapping[str, float]]


@dataclass(frozen=True)
class BaseModel:
    """The base model's folder and its pinned name, known before anything is loaded."""

    path: Path
    reference: ModelRef

    @property
    def loadable_name(self) -> str:
        """What the exported adapter names as its base: a hub id where there is one, else the folder."""
        return models.hub_name(self.reference) or str(self.path.resolve())


def find_model(options: RunConfig) -> BaseModel:
    """Resolve --model and refuse a task that it cannot learn; cheap, so that it comes before a port is bound.

    Raises:
        ValueError: the model cannot be found or is not made for --task, or the file of --init public:FILE is no good.
    """
    check_start(options)
    path = models.resolve(options.model, allow_download=options.allow_download)
    models.check_task(path, options.task, options.max_length)
    return BaseModel(path, models.reference(options.model, path))


def check_start(options: RunConfig) -> None:
    """Raises ValueError where the file of --init public:FILE is no good; cheap, and before anything is trained."""
    _public_rows(options, options.init, options.labels or ())


@dataclass(frozen=True)
class Federation:
    """One run, ready to start: what clients are told, and what the server keeps.

    Attributes:
        start: the round before the first, of --init dp; None without.
    """

    plan: RunPlan
    adapted: AdaptedModel
    task: Task
    state: Tensors
    strategy: FederatedLoRA
    start: PrivateStart | None = None


def prepare(options: RunConfig, strategy: str, base: BaseModel, labels: tuple[str, ...], seed: int, *,
            run_id: str | None = None, protocol: int = PROTOCOL) -> Federation:
    """Load the base model, attach the adapters, and draw every tensor that is not in the base checkpoint.

    Args:
        options: of fedlora-server or fedlora-simulate; None stands for the preset of (strategy, privacy).
        strategy: one of `fedlora.plan.STRATEGIES`.
        labels: the frozen label set; () for tasks that have none; `ANY_LABELS` for a rehearsal.
        seed: of the frozen tensors.
        run_id: 16 hexadecimal digits; None draws them.
        protocol: with which the run began.
    Raises:
        ValueError: the options do not fit the model, the task or each other.
    """
    loaded = models.load(base.path, options.task, len(labels))
    plan = make_plan(options, strategy, base.reference, labels, loaded, run_id or secrets.token_hex(8), protocol)
    adapted = attach_planned(loaded, plan)
    check_adjustment(plan.adjustment, adapted.layout)
    task, init = task_for(plan, loaded.tokenizer), planned(options, strategy).init
    if plan.private:
        Trainer(adapted, task, device="cpu", precision="fp32").rehearse()
    if plan.private_start or (init.startswith(PREFIX) and labels is ANY_LABELS):
        init = "orthonormal"
    rows = _public_rows(options, init, labels)
    if rows is None:
        state = initial_tensors(adapted, init=init, seed=seed)
    else:
        state = public_start(adapted, task, rows, seed=seed)
    start = PrivateStart(plan, adapted, state, seed) if plan.private_start else None
    return Federation(plan, adapted, task, state, STRATEGY_CLASSES[strategy](plan, adapted.layout), start)


def _public_rows(options: RunConfig, init: str | None, labels: tuple[str, ...]) -> data.Rows | None:
    """The rows of --init public:FILE; None for any other start. In a simulation --data is private, here as there."""
    if init is None or not init.startswith(PREFIX):
        return None
    return read_public(init.removeprefix(PREFIX), options.task, labels, columns=options.column,
                       others={"--data": getattr(options, "data", None), "--eval-data": options.eval_data},
                       allow_download=options.allow_download)


def planned(options: RunConfig, strategy: str) -> Preset:
    """The preset of (strategy, --privacy), with the values that flags override.

    Raises:
        ValueError: --max-participations is more than the rounds, --dropout is asked for with privacy, --init dp
            without, another --init does not fit the strategy or --targets, a head that the task does not have is to
            be trained, or --labels names one label.
    """
    chosen = preset(strategy, options.privacy == "required", options.init)
    given = {name: value for field in dataclasses.fields(Preset)
             if (value := getattr(options, name := field.name)) is not None}
    values = dataclasses.replace(chosen, **given)
    if options.max_participations and options.max_participations > values.rounds:
        raise ValueError(f"--max-participations {options.max_participations} is more than the {values.rounds} rounds "
                         "of the run; lower it, or leave it out for exactly the rounds")
    if options.dropout and options.privacy == "required":
        raise ValueError(f"--dropout {options.dropout:g} and privacy exclude each other: a record's mask depends on "
                         "the others in its batch, which no ε covers. Leave --dropout out, or choose --privacy off")
    task = task_named(options.task)
    if task.has_labels() and options.labels is not None and len(options.labels) < 2:
        raise ValueError(f"--labels names {len(options.labels)} label; {task.name} needs at least two")
    if options.head == "train" and not task.has_head:
        raise ValueError(f"--head train needs --task classification; {task.model_is} has no task head")
    if values.init == "kaiming" and STRATEGY_CLASSES[strategy].family == "bra":
        raise ValueError(f"--init kaiming is for trained factors, and {strategy} freezes both; choose --init "
                         "orthonormal, weight, public:FILE or dp")
    if values.init.startswith(PREFIX) and values.targets == ("none",):
        raise ValueError(f"--init {values.init} starts the adapters, and --targets none leaves none; leave one out")
    if values.init == PRIVATE_START and options.privacy != "required":
        raise ValueError(f"--init {PRIVATE_START} is a start from noised gradients, and without privacy there is no "
                         "noise; choose --init orthonormal, weight or public:FILE")
    return values


def without_effect(options: RunConfig) -> list[str]:
    """What was asked for and changes nothing in this run, as sentences."""
    private, head = options.privacy == "required", _trains_head(options)
    reasons = {
        "without privacy nothing is clipped and noised": () if private else (
            "clip_norm", "head_scale", "max_clip_norm", "delta"),
        "no head is trained": ("head_scale",) if private and not head else (),
        "--targets none leaves no adapter": ("rank", "alpha", "init") if options.targets == ("none",) else (),
        "a pass with dropout is not compiled": ("compile",) if options.dropout and getattr(
            options, "compile", False) else (),
        "nothing is evaluated without --eval-data": ("eval_every",) if not options.eval_data and options.eval_every > 1
        else ()}
    return [f"--{name.replace('_', '-')} has no effect: {reason}." for reason, names in reasons.items()
            for name in names if getattr(options, name, None) is not None]


def _trains_head(options: RunConfig) -> bool:
    return task_named(options.task).has_head and options.head != "freeze"


def resolved(options: RunConfig, strategy: str) -> dict[str, object]:
    """The options as a report shows them: the preset's values stand where none were given."""
    return vars(options) | {"strategy": strategy} | dataclasses.asdict(planned(options, strategy))


def make_plan(options: RunConfig, strategy: str, reference: ModelRef, labels: tuple[str, ...],
              loaded: LoadedModel, run_id: str, protocol: int = PROTOCOL) -> RunPlan:
    """The plan that options and the preset give together."""
    values = planned(options, strategy)
    named = {("auto",): automatic_targets, ("all",): all_targets, ("none",): lambda model: ()}
    targets = named[values.targets](loaded.model) if values.targets in named else values.targets
    private = options.privacy == "required"
    as_given = {option.plan: getattr(values, name, getattr(options, name))
                for name, option in options_of(type(options)).items() if option.plan}
    made: dict[str, Any] = {
        "run_id": run_id, "fedlora_version": fedlora.__version__, "strategy": strategy,
        "family": STRATEGY_CLASSES[strategy].family, "private": private, "model": reference, "labels": labels,
        "targets": targets, "train_head": _trains_head(options),
        "max_participations": options.max_participations or values.rounds, "adapter_scale": 1.0,
        "adjustment": "" if options.adjustment == "none" else options.adjustment,
        "weight_by_examples": not private, "private_start": values.init == PRIVATE_START, "protocol": protocol}
    return RunPlan(**as_given | made)


def held_out(options: RunConfig) -> Rows | None:
    """The rows of --eval-data, checked; None without it.

    Raises:
        ValueError: the rows cannot be read, have no labels, or labels outside --labels.
    """
    if options.eval_data is None:
        return None
    task = task_named(options.task)
    rows = read(options.eval_data, options.task, columns=options.column, allow_download=options.allow_download)
    task.check_answered(rows, f"--eval-data {options.eval_data}", task.metric)
    if options.labels and task.has_labels():
        data.check_labels(rows, options.labels)
    return rows


def evaluator(federation: Federation, rows: Rows | None, *, device: str | torch.device = "cpu",
              precision: torch.dtype | None = None) -> Evaluate | None:
    """A function from the state to its task's figures on held-out rows.

    Raises:
        ValueError: a label is outside the run's set.
    """
    if rows is None:
        return None
    records: Records = federation.task.encode(rows)

    def evaluate(state: Tensors) -> Mapping[str, float]:
        federation.adapted.write(state)
        return federation.task.evaluate(federation.adapted.model, records, device=device,
                                        autocast_dtype=precision)

    return evaluate
