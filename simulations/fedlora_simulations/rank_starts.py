"""The command fedlora-simulate rank-starts: what one noised step from each start of a strategy is predicted to gain.

Public rows are dealt out. A quarter fits a classifier's head, as --init-head does, because a head drawn at random lets
hardly any gradient through. A quarter makes the starts that read rows, and a step. Half of the rows judge the step.

    s     mean over the step's rows of each record's gradient, clipped to C
    τ     σ C / (b √K), the noise in each value of the mean of K clients' steps
    ∇, F  mean gradient, and E[g gᵀ] over the records' gradients g, of the rows that judge

A step of length η lowers the loss by about η ⟨∇, s⟩ − η²/2 · (sᵀ F s + τ² tr F), where F stands for the curvature. At
the best length η that is

    ⟨∇, s⟩² / 2 (sᵀ F s + τ² tr F)

The gradients are those of the adapters alone. With n rows that judge, chance alone makes about 1 / 2n of it, so each
figure has its standard error: its standard deviation if ⟨∇, s⟩ were normal around what was found, with the standard
error of that. A step that does not lower the loss has the figure 0, and an error that tells how sure that is. Nothing
but the head is trained, and no private row is read.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from rich.table import Table

from fedlora import data, models, registry
from fedlora.adapters import AdaptedModel, attach_planned, family_of, initial_tensors
from fedlora.adapters.head_start import check_rows, head_start
from fedlora.adapters.public_rows import mean_gradients, read_public, sampled_inputs, some_rows
from fedlora.adapters.start import STARTS
from fedlora.config import Parser, SimulationConfig, build_parser, option, options_of, read_config, values
from fedlora.config.option import PRIVACY, RUN
from fedlora.console import messages, results
from fedlora.plan import Tensors
from fedlora.privacy import Budget
from fedlora.tasks import Records, Task, task_for
from fedlora.training import Trainer
from fedlora_server.observer import jsonable
from fedlora_server.run_setup import find_model, make_plan, planned, recipe_of
from fedlora_strategies import Preset

from .population import Method

USED = frozenset({
    "config", "task", "column", "delimiter", "encoding", "sheet", "label_map", "skip_incomplete", "allow_download",
    "labels", "model", "rank", "alpha", "scaling", "targets", "family_options", "ranks", "max_length", "strategy",
    "epsilon", "delta", "declared_size", "clients", "batch_size", "rounds", "local_steps", "max_participations",
    "clip_norm", "device", "precision", "threads", "micro_batch", "strategy_options"})
"""Options of a simulation that this command takes. A start has no rounds, no optimizer and no private data."""

FIXED = tuple(name for name in options_of(SimulationConfig) if name not in USED)

TYPICAL = 64
"""Records whose gradients' median length is the clip norm where --clip-norm is not given."""

SIZE, CLIENTS = 5000, 2
"""Declared size and number of clients, from which the noise follows, where the options name none."""

HOW_FAR = ("In our trials, this figure ranked the losses after one step well, and those after twelve steps in part. It "
           "did not rank whole runs with AdamW: there, the starts that it puts first ended no better than orthonormal.")


@dataclass(frozen=True, kw_only=True)
class RankStartsConfig(SimulationConfig):
    """Rank the starts (--init) of strategies on public rows, by what one noised step of each is predicted to gain.

    Nothing is trained, so no budget is spent. The same file serves the starts that read texts or rows.
    """

    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-simulate rank-starts --public FILE [--strategy A,B,…] [--epsilon E] [options]",)
    fixed: ClassVar[tuple[str, ...]] = FIXED

    public: str | None = option(None, "rows that are nobody's secret, with labels or answers", RUN,
                                metavar="FILE", place=1)
    rows: int = option(1024, "most rows of it that are used, half of them to judge by", RUN, values.number(int, 8),
                       place=1)
    seed: int = option(0, "seed of everything that is drawn", RUN, values.natural, place=1)
    clients: int | None = option(None, "clients whose steps are averaged", PRIVACY, values.count, unset=str(CLIENTS),
                                 place=2)
    declared_size: int | None = option(None, "each client's declared number of records, which sets the sampling rate",
                                       PRIVACY, values.count, unset=str(SIZE), place=2)
    clip_norm: float | None = option(
        None, "L2 norm to which each record's gradient is clipped", PRIVACY, values.finite,
        unset="for each start the median length of its own gradients, so that its scale does not matter", place=3)
    json: bool = option(False, "print JSON instead of a table", RUN, None)


@dataclass(frozen=True)
class Ranked:
    """The prediction for one start of a strategy.

    Attributes:
        strategy: the strategy.
        start: the start's key, as --init has it, with FILE for the name of a file.
        decrease: predicted decrease of the loss by one noised step of the best length; 0 if the step's direction does
            not lower the loss. None if the start cannot be made.
        error: its standard error, from the choice of the rows that judge. It is above 0 also where the decrease is 0,
            unless all of them gain the same.
        without_noise: the same without noise.
        length: the best length of a noised step, in units of the clipped mean gradient.
        clip_norm: C.
        why_not: why the start cannot be made; "" if it can.
    """

    strategy: str
    start: str
    decrease: float | None = None
    error: float | None = None
    without_noise: float | None = None
    length: float | None = None
    clip_norm: float | None = None
    why_not: str = ""


class Judge:
    """The public rows that make a step and those that judge it, with the model that computes their gradients.

    Args:
        trainer: computes the gradient of each record.
        first: the records that make the step.
        second: the records that judge it.
        noise: τ for a clip norm of 1.
        clip_norm: C; None for the median length of some gradients of `first`.
    """

    def __init__(self, trainer: Trainer, first: Records, second: Records, noise: float,
                 clip_norm: float | None) -> None:
        self._trainer, self._first, self._second = trainer, first, second
        self._noise, self._clip_norm = noise, clip_norm

    def predict(self, state: Tensors) -> tuple[float, float, float, float, float]:
        """Return (decrease, its standard error, decrease without noise, best length, C) for a step from this state."""
        self._trainer.adapted.write(state)
        C = self._clip_norm or self._median_length()
        if not C:
            return 0.0, 0.0, 0.0, 0.0, 0.0
        s = torch.zeros(self._trainer.buffer.values, dtype=torch.float64)
        for rows in self._gradients(self._first):
            s += (rows * (C / rows.norm(dim=1, keepdim=True).clamp(min=C))).sum(dim=0)
        s /= len(self._first)
        count, gain, curved, trace = len(self._second), 0.0, 0.0, 0.0
        for rows in self._gradients(self._second):
            along = rows @ s
            gain += float(along.sum()) / count
            curved += float(along.square().sum()) / count
            trace += float(rows.square().sum()) / count
        noised = curved + (self._noise * C) ** 2 * trace
        if not noised:
            return 0.0, 0.0, 0.0, 0.0, C
        error = _deviation(gain, math.sqrt(max(curved - gain**2, 0.0) / count)) / (2 * noised)
        if gain <= 0:
            return 0.0, error, 0.0, 0.0, C
        return gain**2 / (2 * noised), error, gain**2 / (2 * curved), gain / noised, C

    def _median_length(self) -> float:
        """Return the median length of the gradients of some records of the first rows; 0 if all of them are 0."""
        lengths = np.concatenate([rows.norm(dim=1).numpy() for rows in self._gradients(self._first, TYPICAL)])
        return float(np.median(lengths[lengths > 0])) if lengths.any() else 0.0

    def _gradients(self, records: Records, most: int | None = None) -> Iterator[torch.Tensor]:
        """Yield [records, values] float64 gradients of all or the first records, a micro-batch at a time."""
        trainer, every = self._trainer, np.arange(len(records))[:most]
        try:
            for length, places in trainer.micro_batches(records, every):
                trainer.fill_buffer(records, places, length)
                yield trainer.buffer.rows.detach().cpu().double()
        finally:
            trainer.buffer.disarm()


def _deviation(mean: float, deviation: float) -> float:
    """Return the standard deviation of max(G, 0)², for a normal G with this mean and standard deviation."""
    if not deviation:
        return 0.0
    z = mean / deviation
    above, density = math.erfc(-z / math.sqrt(2)) / 2, math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    second = (z**2 + 1) * above + z * density
    fourth = (z**4 + 6 * z**2 + 3) * above + (z**3 + 5 * z) * density
    return deviation**2 * math.sqrt(max(fourth - second**2, 0.0))


def noise_of_a_step(options: RankStartsConfig, preset: Preset) -> float:
    """Return τ / C: the standard deviation of the noise in each value of the mean step, for a clip norm of 1."""
    if math.isinf(options.epsilon):
        return 0.0
    size = options.declared_size or SIZE
    budget = Budget.declare(size, epsilon=options.epsilon, declared_size=size, delta=options.delta)
    steps = (options.max_participations or preset.rounds) * preset.local_steps
    sigma = budget.noise_multiplier(preset.batch_size, steps)
    return sigma / (preset.batch_size * math.sqrt(options.clients or CLIENTS))


def rank(options: RankStartsConfig, strategy: str) -> list[Ranked]:
    """Return the prediction for each start that fits a strategy, the best one first.

    Args:
        options: the command's options.
        strategy: the strategy's name.

    Raises:
        ValueError: the options do not fit the model, the rows or each other, or too few of the rows can be used.
    """
    assert options.public is not None, "checked when the options were read"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    preset, recipe = planned(options, strategy), recipe_of(options, strategy)
    if not family_of(recipe.family, options.family_options).bases:
        raise ValueError(f"{strategy} takes nothing of a start, so that there is nothing to rank; leave it out")
    noise = noise_of_a_step(options, preset)
    base = find_model(options)
    rows = some_rows(read_public(options.public, options.task, options.labels or (), columns=options.column,
                                 option="--public", init="public", allow_download=options.allow_download,
                                 options=options.read_options()), options.rows, options.seed)
    labels = options.labels or data.label_names(rows)
    loaded = models.load(base.path, options.task, labels)
    plan = make_plan(replace(options, head="freeze"), strategy, base.reference, labels, loaded, "0" * 16)
    adapted = attach_planned(loaded, plan)
    task = task_for(plan, loaded.tokenizer)
    quarters = np.array_split(np.random.default_rng(options.seed).permutation(len(rows)), 4)
    for_head, for_step, to_judge = (rows.take(np.sort(part)) for part in (
        quarters[0], quarters[1], np.concatenate(quarters[2:])))
    first, second = task.encode(for_step), task.encode(to_judge)
    if not (len(first) and len(second)):
        raise ValueError(f"--public {options.public} has too few rows with a label or an answer; name a file with more")
    trainer = Trainer(adapted, task, device=options.device, precision=options.precision,
                      micro_batch=options.micro_batch)
    head: dict[str, np.ndarray] = {}
    drawn = initial_tensors(adapted, init=recipe.start, seed=options.seed)
    if adapted.head is not None:
        check_rows(for_head, labels, f"a quarter of --public {options.public}")
        head = head_start(adapted, task, for_head, drawn, seed=options.seed)
    adapted.write(drawn | head)
    judge = Judge(trainer, first, second, noise, options.clip_norm)
    found = _ranked(options, strategy, adapted, task, first, judge, head)
    return sorted(found, key=lambda one: -math.inf if one.decrease is None else one.decrease, reverse=True)


def _ranked(options: RankStartsConfig, strategy: str, adapted: AdaptedModel, task: Task, first: Records, judge: Judge,
            head: dict[str, np.ndarray]) -> Iterator[Ranked]:
    """Yield the prediction for each start that fits a strategy. The model has an update of 0 when this is called."""
    inputs = sampled_inputs(adapted, task, first, options.seed)
    gradients = mean_gradients(adapted, task, first)
    for key in registry.keys(STARTS):
        start, family = registry.load(STARTS, key).START(), adapted.layout.family
        if start.lacks(family) or start.unfit(family) or start.reads.startswith("clients"):
            continue
        name = f"{key}:{start.takes}" if start.takes else key
        try:
            state = initial_tensors(adapted, init=key, seed=options.seed, gradient=lambda site: gradients[site.name],
                                    inputs=lambda site: inputs[site.name]) | head
        except ValueError as error:
            yield Ranked(strategy, name, why_not=str(error))
            continue
        yield Ranked(strategy, name, *judge.predict(state))


def table(ranked: Sequence[Ranked], options: RankStartsConfig) -> Table:
    """Return a table with one row for each strategy and start, the best one first."""
    noise = "no noise" if math.isinf(options.epsilon) else (
        f"the noise of ε = {options.epsilon:g}, {options.clients or CLIENTS} clients with "
        f"{options.declared_size or SIZE:,} records each")
    shown = Table(box=None, pad_edge=False, title_justify="left", title=f"one step on public rows, with {noise}")
    for name in ("strategy", "start"):
        shown.add_column(name, overflow="fold")
    for name in ("predicted decrease × 1000", "without noise", "best step", "clip norm"):
        shown.add_column(name, justify="right")
    for one in ranked:
        if one.why_not:
            shown.add_row(one.strategy, one.start, "none")
        else:
            shown.add_row(one.strategy, one.start, f"{1000 * (one.decrease or 0):.3g} ± {1000 * (one.error or 0):.2g}",
                          *(f"{value:.3g}" for value in (1000 * (one.without_noise or 0), one.length, one.clip_norm)))
    return shown


def parser() -> Parser:
    """Return the command's parser."""
    return build_parser(RankStartsConfig)


def read_rank_starts_config(argv: Sequence[str]) -> RankStartsConfig:
    """Read the options; exit with code 2 if one is wrong."""
    options, plain, parser = read_config(RankStartsConfig, argv), RankStartsConfig(), build_parser(RankStartsConfig)
    for key in FIXED:
        if getattr(options, key) != getattr(plain, key):
            parser.error(f"--{key.replace('_', '-')} plays no part in one step on public rows; leave it out")
    if options.public is None:
        parser.error("--public is missing: name a file of rows that are nobody's secret")
    if started := [name for name in options.strategy if Method.parse(name).init]:
        parser.error(f"--strategy {started[0]} names a start, and all starts are ranked here; leave it out")
    return replace(options, privacy="off" if math.isinf(options.epsilon) else "required")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 when done, 2 for wrong input."""
    options, console = read_rank_starts_config(argv), messages()
    ranked: list[Ranked] = []
    try:
        for strategy in options.strategy:
            console.print(f"{strategy}: each start's gradients on up to {options.rows:,} rows")
            ranked += rank(options, strategy)
    except (ValueError, MemoryError) as error:
        print(f"fedlora-simulate rank-starts: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(jsonable({"options": vars(options), "ranked": [asdict(one) for one in ranked],
                                   "how_far": HOW_FAR}), indent=1))
        return 0
    results().print(table(ranked, options))
    for one in (one for one in ranked if one.why_not):
        console.print(f"{one.strategy}, {one.start}: {one.why_not}")
    results(markup=False).print(f"\n{HOW_FAR}")
    return 0
