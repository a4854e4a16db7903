"""Preparation of a run from its options: base model, plan, initial tensors, and the evaluation on held-out rows."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fedlora import data, models
from fedlora.adapters import AdaptedModel, attach_planned, family_of, initial_tensors, start_of
from fedlora.adapters.family import check_private
from fedlora.adapters.head_start import check_rows, head_start
from fedlora.adapters.public_rows import public_start, read_public
from fedlora.adapters.start import fitting
from fedlora.config import RunConfig, options_of
from fedlora.data import Rows
from fedlora.models import LoadedModel
from fedlora.plan import AGGREGATE, LEAST_MEMBERS, LOCAL, PROTOCOL, ModelRef, RunPlan, Tensors
from fedlora.plan.limits import MOST_MEMBERS, sum_threshold
from fedlora.tasks import Records, Task, read, task_for, task_named
from fedlora.training import Trainer, padding_counts
from fedlora.training.adjustments import check_adjustment
from fedlora_strategies import FederatedLoRA, Preset, Recipe, strategy_class
from fedlora_strategies.for_model import plan_of
from fedlora_strategies.private_start import PrivateStart

ANY_LABELS = ("0", "1")
"""Placeholder for the labels that clients will announce, so that all else can be checked before they come."""

Evaluate = Callable[[Tensors], Mapping[str, float]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """The base model before it is loaded.

    Attributes:
        path: its folder.
        reference: its name and hashes, as the plan states them.
    """

    path: Path
    reference: ModelRef

    @property
    def title(self) -> str:
        """The name to show on this machine: for a folder its name, with the beginning of its weights' hash."""
        if self.reference.name != "local":
            return self.reference.name
        return f"{self.path.resolve().name} ({self.reference.title})"


def find_model(options: RunConfig) -> BaseModel:
    """Find --model and check that it fits --task. This is quick, so it is done before a port is bound.

    Raises:
        ValueError: the model cannot be found or does not fit --task, or a public file of --init or --init-head is
            unusable.
    """
    check_start(options)
    path = models.resolve(options.model, allow_download=options.allow_download)
    models.check_task(path, options.task, options.max_length)
    return BaseModel(path, models.reference(options.model, path))


def check_start(options: RunConfig) -> None:
    """Check the public files of --init and --init-head. This is quick, so it is done before anything is trained.

    Raises:
        ValueError: a file is unusable.
    """
    _public_rows(options, options.init, options.labels or ())
    _head_rows(options, options.labels or ())


@dataclass(frozen=True)
class Federation:
    """One run, ready to start.

    Attributes:
        plan: what clients are told.
        adapted: the base model with its adapters.
        task: what the model learns.
        state: every tensor that is not in the base checkpoint, as the run starts.
        strategy: makes messages and combines uploads.
        start: a start from the clients' gradients, a round before the first; None without it.
    """

    plan: RunPlan
    adapted: AdaptedModel
    task: Task
    state: Tensors
    strategy: FederatedLoRA
    start: PrivateStart | None = None

    @property
    def described(self) -> Mapping[str, object]:
        """The parts of the server step, and the start if clients release it: what a resumed run must have again."""
        return {**self.strategy.described, **({"init": self.start.init} if self.start else {})}


def prepare(options: RunConfig, strategy: str, base: BaseModel, labels: tuple[str, ...], seed: int, *,
            run_id: str | None = None, protocol: int = PROTOCOL, members: int | None = None) -> Federation:
    """Load the base model, attach the adapters, and draw every tensor that is not in the base checkpoint.

    Args:
        options: options of fedlora-server or fedlora-simulate; a value of None stands for the preset's.
        strategy: the strategy's name, as `strategy_class` takes it.
        base: the base model.
        labels: the run's label set; () for tasks without labels; `ANY_LABELS` to check all else beforehand.
        seed: decides the tensors that are drawn.
        run_id: 16 hexadecimal digits; None draws them at random.
        protocol: the protocol version with which the run began.
        members: the number of a simulation's clients, for secure aggregation; None for a server, which waits for
            --min-clients.

    Raises:
        ValueError: the options do not fit the model, the task or each other.
    """
    loaded = models.load(base.path, options.task, len(labels) if labels is ANY_LABELS else labels)
    _say(loaded.said)
    plan = make_plan(options, strategy, base.reference, labels, loaded, run_id or secrets.token_hex(8), protocol,
                     members)
    adapted = attach_planned(loaded, plan)
    check_adjustment(plan.adjustment, adapted.layout)
    task, named = task_for(plan, loaded.tokenizer), planned(options, strategy).init
    if plan.private:
        Trainer(adapted, task, device="cpu", precision="fp32").rehearse()
    elif padding_counts(adapted, task):
        _say("This model does not ignore padding: what it predicts for a text depends on how far the text is padded. "
             "So its adapter predicts differently where texts are batched differently.")
    init = "orthonormal" if plan.private_start or (start_of(named)[1] and labels is ANY_LABELS) else named
    rows, known = _public_rows(options, init, labels), None if labels is ANY_LABELS else _head_rows(options, labels)
    head: dict[str, np.ndarray] = {}
    if rows is None or known is not None:
        state = initial_tensors(adapted, init=init if rows is None else "orthonormal", seed=seed)
        head = {} if known is None else head_start(adapted, task, known, state, seed=seed)
        state |= head
    if rows is not None:
        state = public_start(adapted, task, rows, seed=seed, init=init.partition(":")[0], head=head)
    recipe = recipe_of(options, strategy)
    start = None
    if plan.private_start:
        start = PrivateStart(plan, adapted, named, state, seed, recipe.reduction)
        size, most = 4 * start.traffic.down, models.most_adapter_bytes(base.path)
        if size > most:
            raise ValueError(f"--init {start.init} sends {size / 1e9:.3g} GB of gradients, and clients take at most "
                             f"{most / 1e9:.3g} GB for this model; name fewer --targets, or choose --init gradient")
    chosen = strategy_class(strategy)(plan, adapted.layout, recipe=recipe, seed=seed)
    if options.client_ranks:
        chosen.check_ranks(dict(options.client_ranks).values())
    if options.screen is not None:
        for one in filter(None, (chosen, start)):
            one.screen = options.screen
    return Federation(plan, adapted, task, state, chosen, start)


@functools.cache
def _say(warning: str) -> None:
    """Log a warning about the model or the data, once, even if they are used several times."""
    if warning:
        log.warning("%s", warning)


def _public_rows(options: RunConfig, init: str | None, labels: tuple[str, ...]) -> data.Rows | None:
    """Read the rows of a start from a public file, such as --init public:FILE; None for any other start.

    The file must not overlap with --data (a simulation's private rows) or --eval-data.
    """
    if not (init and start_of(init)[1]):
        return None
    key, _, file = init.partition(":")
    return read_public(file, options.task, labels, columns=options.column, init=key,
                       others={"--data": getattr(options, "data", None), "--eval-data": options.eval_data},
                       allow_download=options.allow_download, options=options.read_options())


def _head_rows(options: RunConfig, labels: tuple[str, ...]) -> data.Rows | None:
    """Read the rows of --init-head, under the same conditions as those of --init; None without the option."""
    if not options.init_head:
        return None
    key, _, file = options.init_head.partition(":")
    rows = read_public(file, options.task, labels, columns=options.column, init=key, option="--init-head",
                       others={"--data": getattr(options, "data", None), "--eval-data": options.eval_data},
                       allow_download=options.allow_download, options=options.read_options())
    check_rows(rows, labels, f"--init-head {options.init_head}")
    return rows


def remarks(options: RunConfig) -> list[str]:
    """Return what is told of the options, whatever the strategy, before a run starts."""
    ranks = ", ".join(f"{name} trains {rank}" for name, rank in options.client_ranks)
    return [*without_effect(options), *about_the_head(options),
            *([f"Of the adapter's ranks {ranks}; every other client trains all of them."] if ranks else [])]


def is_one_step(options: RunConfig) -> bool:
    """Return whether clients do one local step a round, after which the server's optimizer steps."""
    return options.one_step or options.secure_aggregation


def check_members(options: RunConfig, members: int, counted: str) -> None:
    """Check that a run with secure aggregation can have so many members.

    Args:
        options: options of fedlora-server or fedlora-simulate.
        members: the number of clients with which the run begins.
        counted: the option that sets this number.

    Raises:
        ValueError: there are too few or too many, or more of them may collude than sums allow for.
    """
    if not options.secure_aggregation:
        return
    if not LEAST_MEMBERS <= members <= MOST_MEMBERS:
        raise ValueError(f"--secure-aggregation takes {LEAST_MEMBERS} to {MOST_MEMBERS} clients, and {counted} is "
                         f"{members}: " + ("each of two learns the other's gradient from the sum. Raise it"
                                           if members < LEAST_MEMBERS else "lower it"))
    spare = members - sum_threshold(members)
    if options.colluding > spare:
        raise ValueError(f"--colluding is {options.colluding}, and with {members} clients it can be at most {spare}: a "
                         f"sum may hold {sum_threshold(members)} of them. Lower it, or raise {counted}")


def about_the_head(options: RunConfig) -> list[str]:
    """Return a sentence on the rows that the head starts from, with --init-head."""
    return [f"The head starts from a regression on the public rows of {options.init_head.partition(':')[2]}, which "
            "costs no ε."] if options.init_head else []


def recipe_of(options: RunConfig, strategy: str) -> Recipe:
    """Return the strategy's recipe, with the parts and values that flags replace.

    Raises:
        ValueError: the strategy, the reduction or the server's optimizer has no such option, or the value is outside of
            its range.
    """
    recipe = strategy_class(strategy).recipe
    if is_one_step(options):
        recipe = recipe.in_one_step()
    try:
        recipe = recipe.with_options(dict(options.strategy_options))
    except ValueError as error:
        raise ValueError(f"--strategy-options of {strategy}: {error}") from None
    if options.reduction is not None or options.reduction_options:
        try:
            recipe = recipe.with_reduction(options.reduction, dict(options.reduction_options))
        except ValueError as error:
            raise ValueError(f"--reduction-options: {error}") from None
    if isinstance(options.ranks, str):
        try:
            recipe = recipe.with_ranks(options.ranks, options.rounds or recipe.preset(
                options.privacy == "required", options.init).rounds)
        except ValueError as error:
            raise ValueError(f"--ranks {options.ranks}: {error}") from None
    given = dict(options.server_options) | ({} if options.server_lr is None else {"lr": options.server_lr})
    if options.server_optimizer is None and not given:
        return recipe
    try:
        return recipe.with_optimizer(options.server_optimizer, given)
    except ValueError as error:
        raise ValueError(f"--server-options: {error}") from None


def fewest_uploads(options: RunConfig, strategy: str, clients: int, counted: str) -> int:
    """Return how many uploads a round must have: those that the run's reduction needs, or that open a sum.

    Args:
        options: options of fedlora-server or fedlora-simulate.
        strategy: the strategy's name.
        clients: the number of clients with which a round may begin.
        counted: the option that sets this number.

    Raises:
        ValueError: a round may close with fewer uploads, by --clients-per-round, --min-replies or `counted`; or as for
            `check_members`.
    """
    if options.secure_aggregation:
        check_members(options, clients, counted)
        return sum_threshold(clients)
    recipe = recipe_of(options, strategy)
    described, fewest = cast(Mapping[str, Any], recipe.described()["reduction"]), recipe.reduction.fewest
    told = ", ".join(f"{value}" if name == "name" else f"{name} {value:g}" for name, value in described.items())
    for flag, number in (("--clients-per-round", options.clients_per_round), ("--min-replies", options.min_replies),
                         (counted, clients)):
        if number is not None and number < fewest:
            raise ValueError(f"the reduction {told} needs at least {fewest} uploads in a round, and {flag} is "
                             f"{number}; raise {flag} to {fewest}, or choose another --reduction or other "
                             "--reduction-options")
    return fewest


def about_the_reduction(options: RunConfig, strategy: str) -> list[str]:
    """Return a sentence on what the run's reduction costs its strategy, where it is not a weighted mean."""
    recipe = recipe_of(options, strategy)
    if recipe.reduction.linear or not family_of(recipe.family, options.family_options).exact:
        return []
    return [f"With this --reduction the server does not average: the adapters that {strategy} combines are no longer "
            "exactly the mean of the clients' models, and the run cannot use secure aggregation."]


def planned(options: RunConfig, strategy: str) -> Preset:
    """Return the preset of (strategy, --privacy), with the values that flags override. --scaling rs changes its alpha.

    Raises:
        ValueError: the options contradict each other: --max-participations is above the number of rounds, --dropout is
            combined with privacy, so is a strategy whose family refuses it, --init dp with none, a start from gradients
            without noise with it, --scaling rs with --ranks, --init does not fit the strategy or --targets, --head
            train or --init-head is asked for a task without a head, --init-head for a head that is not trained, or
            --labels names fewer than two labels; or what --one-step or --secure-aggregation excludes is given.
    """
    recipe = recipe_of(options, strategy)
    chosen = recipe.preset(options.privacy == "required", options.init)
    given = {name: value for field in dataclasses.fields(Preset)
             if (value := getattr(options, name := field.name)) is not None}
    values = dataclasses.replace(chosen, **given)
    if options.scaling == "rs":
        if options.ranks and not isinstance(options.ranks, str):
            raise ValueError("--scaling rs and --ranks exclude each other: alpha is one number for all layers, and "
                             "alpha·√rank would be another for each rank. Leave --ranks out, or choose --scaling plain")
        values = dataclasses.replace(values, alpha=values.alpha * math.sqrt(values.rank))
    if options.max_participations and options.max_participations > values.rounds and not options.secure_aggregation:
        raise ValueError(f"--max-participations {options.max_participations} is more than the {values.rounds} rounds "
                         "of the run; lower it, or leave it out for exactly the rounds")
    if options.dropout and options.privacy == "required":
        raise ValueError(f"--dropout {options.dropout:g} and privacy exclude each other: a record's mask depends on "
                         "the others in its batch, which no ε covers. Leave --dropout out, or choose --privacy off")
    task, family = task_named(options.task), family_of(recipe.family, options.family_options)
    start, file = start_of(values.init)
    _check_one_step(options, strategy, recipe, values)
    if options.privacy == "required":
        check_private(family)
    if task.has_labels and options.labels is not None and len(options.labels) < 2:
        raise ValueError(f"--labels names {len(options.labels)} label; {task.name} needs at least two")
    if options.head == "train" and not task.has_head:
        raise ValueError(f"--head train needs --task classification; {task.model_is} has no task head")
    if options.init_head and not task.has_head:
        raise ValueError(f"--init-head starts a classifier's head, and {task.model_is} has no task head; leave it out")
    if options.init_head and options.head == "freeze":
        raise ValueError("--init-head starts the head that clients train, and --head freeze keeps it from training; "
                         "leave one of them out")
    if lacking := start.lacks(family):
        raise ValueError(f"--init {values.init} gives no {' and no '.join(lacking)}, which {strategy} needs of its "
                         f"start; choose --init {fitting(family)}")
    if why := start.unfit(family):
        raise ValueError(f"--init {values.init} does not suit {strategy}: {why}; choose --init {fitting(family)}")
    if file and values.targets == ("none",):
        raise ValueError(f"--init {values.init} starts the adapters, and --targets none leaves none; leave one out")
    if start.reads == "clients" and options.privacy != "required":
        raise ValueError(f"--init {values.init} is a start from noised gradients, and without privacy there is no "
                         "noise; choose --init gradient, which sends them as they are, or another start")
    if start.reads == "clients without noise" and options.privacy == "required":
        raise ValueError(f"--init {values.init} has clients send gradients without noise, which would release private "
                         f"rows; choose --init dp or {start.if_private}, or a run without privacy")
    return values


def _check_one_step(options: RunConfig, strategy: str, recipe: Recipe, values: Preset) -> None:
    """Check that nothing is asked for that --one-step or --secure-aggregation excludes."""
    secure = options.secure_aggregation
    if is_one_step(options) and values.local_steps != 1:
        raise ValueError(f"--{'secure-aggregation' if secure else 'one-step'} and --local-steps {values.local_steps} "
                         "exclude each other" + (": a later step would have only its own share of the noise" if secure
                                                 else "") + "; leave --local-steps out")
    if not secure:
        for name in ("colluding", "least_noise", "hold_out"):
            if value := getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} {value:g} is for --secure-aggregation; leave it out, or "
                                 "give both")
        return
    if options.privacy != "required":
        raise ValueError("--secure-aggregation and --privacy off exclude each other: clients share the noise of a sum; "
                         "leave one of the two out")
    for name, why in (
            ("clients_per_round", "each round asks all members of the roster"),
            ("min_replies", "a sum is opened with two thirds of the roster and one more"),
            ("screen", "the server sees no upload that it could compare")):
        flag = f"--{name.replace('_', '-')}"
        if (given := getattr(options, name)) is not None:
            raise ValueError(f"--secure-aggregation and {flag} {given:g} exclude each other: {why}; leave {flag} out")
    if values.optimizer != "sgd":
        raise ValueError(f"--secure-aggregation and --optimizer {values.optimizer} exclude each other: the server "
                         "steps, with --server-optimizer; leave --optimizer out")
    if options.adjustment != "none":
        raise ValueError(f"--secure-aggregation and --adjustment {options.adjustment} exclude each other: gradients "
                         "are noised enough only in the sum; leave --adjustment out")
    if start_of(values.init)[0].reads.startswith("clients"):
        raise ValueError(f"--secure-aggregation and --init {values.init} exclude each other: the start would be a "
                         "release of its own; choose another start")
    try:
        recipe.check_linear()
    except ValueError as error:
        raise ValueError(f"--strategy {strategy} cannot be run with --secure-aggregation: {error}") from None


def without_effect(options: RunConfig) -> list[str]:
    """Return a sentence for each option that was given and has no effect in this run."""
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
    """Return the options for a report, with the preset's value for each option that was not given."""
    return vars(options) | {"strategy": strategy} | dataclasses.asdict(planned(options, strategy))


def make_plan(options: RunConfig, strategy: str, reference: ModelRef, labels: tuple[str, ...],
              loaded: LoadedModel, run_id: str, protocol: int = PROTOCOL, members: int | None = None) -> RunPlan:
    """Make the plan from the options and the preset.

    Args:
        options: options of fedlora-server or fedlora-simulate.
        strategy: the strategy's name.
        reference: the base model's name and hashes.
        labels: the run's label set.
        loaded: the base model.
        run_id: 16 hexadecimal digits.
        protocol: the protocol version with which the run began.
        members: the number of a simulation's clients, for secure aggregation; None for a server's --min-clients.
    """
    values = planned(options, strategy)
    private = options.privacy == "required"
    others = {option.plan: getattr(options, name) for name, option in options_of(type(options)).items()
              if option.plan and not hasattr(values, name) and option.plan not in ("strategy", "model", "task")}
    ranks, start = () if isinstance(options.ranks, str) else options.ranks, start_of(values.init)[0]
    made = {"run_id": run_id, "private": private, "labels": labels, "train_head": _trains_head(options),
            "max_participations": options.max_participations or values.rounds, "protocol": protocol,
            "adjustment": "" if options.adjustment == "none" else options.adjustment,
            "ranks": ranks, "mechanism": AGGREGATE if options.secure_aggregation else LOCAL,
            "least_members": (members or getattr(options, "min_clients", 0)) if options.secure_aggregation else 0,
            "private_start": start.reads.startswith("clients"), "whole_gradients": start.whole}
    recipe = recipe_of(options, strategy)
    rank = max([values.rank, *(rank for _, rank in ranks)])
    if asked := dict(recipe.family_options(rank, values.rounds)):
        made["family_options"] = tuple(sorted((asked | dict(options.family_options)).items()))
    return plan_of(strategy, recipe.family, values, reference, loaded, **others | made)


def held_out(options: RunConfig) -> Rows | None:
    """Read and check the rows of --eval-data; None without it.

    Raises:
        ValueError: the rows cannot be read, lack labels or answers, or have a label outside of --labels.
    """
    if options.eval_data is None:
        return None
    task = task_named(options.task)
    rows = read(options.eval_data, options.task, columns=options.column, allow_download=options.allow_download,
                declared=options.labels or (), held_out=True, options=options.read_options())
    task.check_answered(rows, f"--eval-data {options.eval_data}", task.metric)
    if options.labels and task.has_labels:
        data.check_labels(rows, options.labels)
    return rows


def evaluator(federation: Federation, rows: Rows | None, *, device: str | torch.device = "cpu",
              precision: torch.dtype | None = None) -> Evaluate | None:
    """Return a function that computes the task's figures of a state on held-out rows; None without rows.

    Args:
        federation: the run; its model is written to at each evaluation.
        rows: the held-out rows.
        device: where to evaluate.
        precision: the dtype to evaluate in; None for float32.

    Raises:
        ValueError: a row's label is outside of the run's set.
    """
    if rows is None:
        return None
    if others := data.rows_in_other_capitals(rows, federation.plan.labels):
        _say(f"--eval-data: {len(others):,} of {len(rows):,} rows have a label that differs from one in the run's set "
             f"only in capitals, and is read as that one ({rows.where(others[0])} is the first)")
    records: Records = federation.task.encode(rows)

    def evaluate(state: Tensors) -> Mapping[str, float]:
        federation.adapted.write(state)
        return federation.task.evaluate(federation.adapted.model, records, device=device,
                                        autocast_dtype=precision)

    return evaluate
