"""The simulation's --dry-run: show each method's plan, traffic and noise, and measure how long its runs will take."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from fedlora.config import SimulationConfig
from fedlora.data import Rows
from fedlora.plan import ROW, RunPlan
from fedlora.privacy import Budget, RunTerms, four_digits, nominal_size, short
from fedlora.privacy.rng import RunStreams
from fedlora.quantities import duration
from fedlora.training import Trainer, TrainingJob
from fedlora.training.timing import alike, seconds_of_steps
from fedlora_client.terms import Limits, private_terms
from fedlora_server.dry_run import noise_of, show_plan, traffic
from fedlora_server.run_setup import (
    BaseModel,
    Federation,
    about_the_reduction,
    evaluator,
    planned,
    prepare,
    remarks,
)
from fedlora_server.settings import settings

from .comparison import OF_SUMS
from .population import Method, Population
from .simulated_roster import aggregate_epsilon, local_epsilon, simulated_limits, simulated_roster
from .simulated_run import compiles_here
from .sweep import Setting
from .worker import threads_each

STEPS = 2
"""Number of training steps that are timed after a first one, of which the quickest counts."""

EVALUATED = 64
"""The most held-out rows that are evaluated to time it."""


@dataclass(frozen=True)
class Forecast:
    """The forecast of one run's time, in seconds.

    Attributes:
        a_round: training in one round, over all its clients.
        training: training in all rounds.
        evaluation: all evaluations of the run.
    """

    a_round: float
    training: float
    evaluation: float


def dry_run(options: SimulationConfig, methods: Sequence[Method], base: BaseModel, population: Population,
            console: Console) -> None:
    """Show the runs that the options ask for. No run is started and no file is written.

    Args:
        options: the options of fedlora-simulate, checked.
        methods: the methods.
        base: the base model.
        population: the clients and rows of the first seed.
        console: where it is shown.

    Raises:
        ValueError: the options do not fit the model, the data or each other.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    seeds = len(options.seeds)
    for column in ("method", "a round", "training", "evaluation", f"{seeds} seed{'s' * (seeds > 1)}"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    whole = 0.0
    for told in remarks(options):
        console.print(told)
    for method in methods:
        own = method.options(options)
        console.print(settings(own, method.strategy, planned(own, method.strategy)))
        for told in about_the_reduction(own, method.strategy):
            console.print(told)
        federation = prepare(own, method.strategy, base, population.labels, options.seeds[0],
                             members=len(population.parts))
        show_plan(federation.plan, console)
        console.print(traffic(federation, _cohort(own, population)))
        if federation.plan.private:
            console.print(f"\nNoise multiplier σ of the {len(population.parts)} clients")
            console.print(noise_of_sums(own, federation, population) if own.secure_aggregation else
                          noise_of(federation.plan, budgets(own, population)))
        if options.engine != "ray":
            found = forecast(own, federation, population)
            seconds = seeds * (found.training + found.evaluation)
            whole += seconds
            table.add_row(str(method), *map(duration, (found.a_round, found.training, found.evaluation, seconds)))
        console.print()
    if options.engine == "ray":
        console.print("Time: Ray's machines decide, so no forecast is made.")
    else:
        console.print("Time, from a few steps with made-up records as long as a client's, on this machine as busy as "
                      "it is now")
        console.print(table)
        console.print(f"{duration(whole)} in all" + (
            f", if {options.workers} workers do not slow each other down" if options.workers > 1 else "") + (
            "; --batch-clients will be faster" if options.batch_clients > 1 else "") + ".")
    console.print("Nothing was started, and nothing was written.")


def dry_run_of_a_sweep(options: SimulationConfig, runs: Sequence[tuple[Setting, Method, BaseModel, Population]],
                       trials: int, console: Console) -> None:
    """Show one line for each method and setting, with its noise and time. No run is started and no file is written.

    Args:
        options: the options of fedlora-simulate, checked.
        runs: setting, method, base model, and the clients and rows of the first seed.
        trials: number of trials of --tune for each method and setting.
        console: where it is shown.

    Raises:
        ValueError: the options do not fit the model, the data or each other.
    """
    seeds, timed, whole = len(options.seeds), dict[str, Forecast](), 0.0
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    swept = list(runs[0][0].values)
    for column in (*swept, "method", "σ", "a round", "one run", f"{seeds} seed{'s' * (seeds > 1)}"):
        table.add_column(column, justify="left" if column in (*swept, "method") else "right", no_wrap=True)
    for setting, method, base, population in runs:
        own = method.options(setting.options)
        steps = planned(own, method.strategy)
        sigmas: list[float] = []
        if own.secure_aggregation:
            federation = prepare(own, method.strategy, base, population.labels, options.seeds[0],
                                 members=len(population.parts))
            sigmas = sorted({of.noise_multiplier or 0.0 for of in terms_of(own, federation.plan, population).values()})
        elif own.privacy == "required":
            times = (own.max_participations or steps.rounds) * steps.local_steps
            sigmas = sorted({budget.noise_multiplier(steps.batch_size, times)
                             for budget in budgets(own, population).values()})
        noise = " to ".join(dict.fromkeys(map(short, (sigmas[0], sigmas[-1])))) if sigmas else "none"
        told = ["", "", ""]
        if options.engine != "ray":
            found = timed.get(_alike(own, method))
            if found is None:
                federation = prepare(own, method.strategy, base, population.labels, options.seeds[0],
                                     members=len(population.parts))
                found = timed[_alike(own, method)] = forecast(own, federation, population)
            run = found.training + found.evaluation
            whole += seeds * run + trials * found.training
            told = [duration(found.a_round), duration(run), duration(seeds * run)]
        table.add_row(*setting.values.values(), str(method), noise, *told)
    console.print(table)
    console.print(f"{len(runs) * seeds} runs, each with one method, one seed and one value of each swept option"
                  + (f"; before them {len(runs) * trials} of --tune" if trials else "") + ".")
    if options.engine == "ray":
        console.print("Time: Ray's machines decide, so no forecast is made.")
    else:
        console.print(f"{duration(whole)} in all, from a few steps with made-up records as long as a client's, on this "
                      "machine as busy as it is now.")
    console.print("Nothing was started, and nothing was written.")


def _alike(options: SimulationConfig, method: Method) -> str:
    """Return what tells apart runs that may take different times. A finite ε makes no difference."""
    return repr((replace(options, epsilon=1.0 if options.privacy == "required" else math.inf),
                 str(method)))


def budgets(options: SimulationConfig, population: Population) -> dict[str, Budget]:
    """Return each client's budget, by client name, as its session will declare it."""
    limits = Limits.of(options, options.privacy_unit or ROW)
    return {name: replace(limits, declared_size=options.declared_size or nominal_size(size)).budget(size)
            for name, size in population.sizes.items()}


def terms_of(options: SimulationConfig, plan: RunPlan, population: Population) -> dict[str, RunTerms]:
    """Return each client's terms of a private run, by client name, as its session will settle them."""
    limits = simulated_limits(options, len(population.parts))
    return {name: private_terms(limits, budget, plan) for name, budget in budgets(options, population).items()}


def noise_of_sums(options: SimulationConfig, federation: Federation, population: Population) -> Table:
    """Return a table with the clients' own noise and both ε of a run with secure aggregation.

    Args:
        options: the options of fedlora-simulate, with the method's start.
        federation: the run.
        population: the clients and their rows.

    Raises:
        ValueError: no noise keeps a budget, or the grid is too coarse for a client's δ.
    """
    terms = terms_of(options, federation.plan, population)
    roster = simulated_roster(federation.plan, terms, federation.strategy.summed)
    assert roster is not None
    every, alike = list(terms.values()), Counter(map(_told_of, terms.values()))
    table = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left", title=(  # fits 80 columns
        f"ε is for each client's own noise; {OF_SUMS} holds towards whoever sees sums alone, each with the noise of "
        f"{roster.honest} honest clients of {len(roster.entries)}"))
    for column in ("clients", "declared size", "sampling rate", "σ", "ε", OF_SUMS, "δ"):
        table.add_column(column, justify="right", no_wrap=True)
    for told, count in alike.items():
        of = next(one for one in every if _told_of(one) == told)
        size, rate, sigma, delta = told
        table.add_row(str(count), f"{size:,}", short(rate), short(sigma),
                      four_digits(local_epsilon(of, of.max_participations)),
                      four_digits(aggregate_epsilon(roster, of, of.max_participations)), short(delta, up=True))
    return table


def _told_of(terms: RunTerms) -> tuple[int, float, float, float]:
    """Return what the dry run tells of a client's terms: declared size, sampling rate, noise multiplier, δ."""
    return terms.declared_size, terms.sampling_rate, terms.noise_multiplier or 0.0, terms.delta or 0.0


def forecast(options: SimulationConfig, federation: Federation, population: Population) -> Forecast:
    """Return how long one run will take, from a few steps of the client with the median number of records.

    Args:
        options: the options of fedlora-simulate, with the method's start.
        federation: the run; its trained tensors change.
        population: the clients and their rows.
    """
    plan, task = federation.plan, federation.task
    workers = min(options.workers, len(population.parts))
    threads = threads_each(workers) if options.threads is None and workers > 1 else options.threads
    trainer = Trainer(federation.adapted, task, device=options.device, precision=options.precision,
                      micro_batch=options.micro_batch, threads=threads, compiled=compiles_here(options))
    found = population.records(task)
    name = sorted(found, key=lambda name: len(found[name]))[len(found) // 2]
    records = alike(found[name], trainer)
    if plan.private:
        rate = budgets(options, population)[name].sampling_rate(plan.expected_batch)
    else:
        rate = min(1.0, plan.expected_batch / (options.declared_size or max(1, records.units_count)))
    job = TrainingJob(plan, records, None, sampling_rate=rate,
                      noise_multiplier=1.0 if plan.private else None, clip_norm=plan.clip_norm,
                      streams=RunStreams("dry-run", 0), rows_per_unit=options.rows_per_unit)
    step = min(seconds_of_steps(trainer, job, 1 + STEPS))
    clients = _cohort(options, population)
    a_round = clients * plan.local_steps * step / workers
    rounds = min(plan.rounds, plan.max_participations * len(population.parts) // clients) + plan.private_start
    evaluation = _evaluation(options, federation, population.held_out, trainer) if population.held_out else 0.0
    return Forecast(a_round, rounds * a_round, evaluation)


def _evaluation(options: SimulationConfig, federation: Federation, held_out: Rows, trainer: Trainer) -> float:
    """Return the seconds of all evaluations of a run, from one on a few of the rows."""
    rows = held_out.take(np.arange(min(EVALUATED, len(held_out))))
    evaluate = evaluator(federation, rows, device=trainer.device, precision=trainer.autocast_dtype)
    assert evaluate is not None
    state = federation.adapted.read("state")
    evaluate(state)
    began = time.monotonic()
    evaluate(state)
    times = 1 + -(-federation.plan.rounds // options.eval_every)
    return times * (time.monotonic() - began) * len(held_out) / len(rows)


def _cohort(options: SimulationConfig, population: Population) -> int:
    return min(options.clients_per_round or len(population.parts), len(population.parts))
