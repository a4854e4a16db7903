"""The server's --dry-run: check what can be checked without clients, and show what the run would be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from fedlora.config import ServerConfig, flag, shown
from fedlora.kit import NO_RUN
from fedlora.plan import ModelRef, RunPlan, plan_digest
from fedlora.privacy import MOST_SAMPLING_RATE, Accountant, Budget, Spend, four_digits, short
from fedlora.privacy.mechanisms import mechanism_named
from fedlora.privacy.mechanisms.distributed_gaussian import foretold_epsilon, honest
from fedlora.quantities import quantity
from fedlora.tasks import task_named

from . import checkpoint
from .folders import check_free
from .grpc_engine import check_address
from .round_options import round_options
from .run_setup import (
    ANY_LABELS,
    Federation,
    about_the_reduction,
    find_model,
    held_out,
    planned,
    prepare,
    remarks,
)
from .secure_start import check_options, check_sum, foreseen_grid
from .settings import settings
from .tls import ServerTls
from .trackers import check_installed

EPSILONS = (1.0, 3.0, 8.0)
"""Values of ε for which the server shows the noise; the client's default is the last one."""

SIZES = (1_000, 5_000, 20_000, 100_000)
"""Declared sizes for which the server shows the noise: it cannot know those of the clients to come."""


def dry_run(options: ServerConfig, console: Console) -> None:
    """Check the options, the model and the held-out data, and show the run. Nothing listens, and no file is written.

    Args:
        options: the command's options.
        console: where it is shown.

    Raises:
        ValueError: the run could not start with these options.
        OSError: a file cannot be read.
    """
    if options.resume is not None or (options.out is not None and checkpoint.holds_unfinished_run(options.out)):
        raise ValueError(f"--dry-run shows a new run, and {options.resume or options.out} holds one that would go on; "
                         "leave out --dry-run to continue it, or name another folder")
    if options.out is not None:
        check_free(options.out)
    check_installed(options.trackers)
    check_address(options.address, insecure=options.insecure or options.tls is not None)
    if options.tls is not None:
        console.print(ServerTls(options.tls).told())
    rounds = round_options(options)
    check_options(options, over_grpc=True)
    base, task, values = find_model(options), task_named(options.task), planned(options, options.strategy)
    rows = held_out(options)
    announced = task.has_labels and not options.labels
    console.print(settings(options, options.strategy, values))
    for told in (*remarks(options), *about_the_reduction(options, options.strategy)):
        console.print(told)
    federation = prepare(options, options.strategy, base, ANY_LABELS if announced else options.labels or (),
                         options.seed)
    plan = federation.plan
    check_sum(federation.strategy)
    show_plan(plan.with_open_labels() if announced else plan, console)
    cohort = min(options.clients_per_round or options.min_clients, options.min_clients)
    console.print(traffic(federation, cohort))
    if plan.private:
        console.print("\nNoise multiplier σ by the number of records (or units) that a client declares, and by the ε "
                      "that it allows (8 unless it says otherwise)")
        console.print(noise_by_size(plan))
        if plan.secure_aggregation:
            console.print(assumed(plan))
    possible = rounds.rounds_within(plan.rounds, plan.max_participations)
    evaluated = "nothing is evaluated, without --eval-data" if rows is None else f"{len(rows):,} rows to evaluate on"
    console.print(f"\nRounds: {possible} of {plan.rounds} are possible with {options.min_clients} clients; "
                  f"{evaluated}.\nTime: the clients' machines decide, so no forecast is made. A client that needs more "
                  f"than {options.round_timeout:g} s in a round is dropped (--round-timeout). fedlora-simulate "
                  "--dry-run measures on this machine.\nNothing was started, and nothing was written.")


def show_plan(plan: RunPlan, console: Console) -> None:
    """Print the values of a plan and its digest.

    Args:
        plan: the plan.
        console: where it is shown.
    """
    table = Table.grid(padding=(0, 2))
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.name == "labels" and plan.labels_open:
            value = "those that clients announce"
        elif isinstance(value, ModelRef):
            value = f"{value.title}, weights {value.weights_sha256[:12]}…"
        elif value in ((), ""):
            value = "none"
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, tuple) and isinstance(value[0], tuple):
            value = ",".join(f"{name}={number:g}" for name, number in value)
        if field.name != "run_id":
            table.add_row("", flag(field.name), shown(value))
    console.print("\nPlan that clients are told")
    console.print(table)
    console.print(f"SHA-256 with run id {NO_RUN} (a start draws an id of its own):\n"
                  f"  {plan_digest(replace(plan, run_id=NO_RUN))}")


def traffic(federation: Federation, cohort: int) -> str:
    """Return lines about the bytes that travel.

    Args:
        federation: the run.
        cohort: number of clients in a round.
    """
    plan, moved = federation.plan, federation.strategy.traffic
    size = 2 if plan.wire_dtype == "bf16" else 4
    up, down, once = (size * count for count in (moved.up, moved.down, moved.once))
    if plan.secure_aggregation:
        up = foreseen_grid(federation.strategy).dtype.itemsize * (moved.up + plan.counted)
    whole, told = plan.rounds * cohort * (up + down) + cohort * once, ""
    if federation.start is not None:
        start = federation.start.traffic
        whole += size * cohort * (start.up + start.down + start.once)
        told = (f" In it is the start from the clients' gradients, before round 1: {quantity(size * start.up)} up and "
                f"{quantity(size * (start.down + start.once))} down for each.")
    before = f", after {quantity(once)} down in its first one" if once else ""
    return (f"\nTraffic: each client and round {quantity(up)} up and {quantity(down)} down{before}; about "
            f"{quantity(whole)} in all for {plan.rounds} round{'s' * (plan.rounds != 1)} of {cohort} client"
            f"{'s' * (cohort != 1)}, without headers.{told} "
            f"{federation.adapted.layout.num_trained:,} values are trained.")


def noise_by_size(plan: RunPlan) -> Table:
    """Return a table with the noise of clients that declare `SIZES` records and ask for `EPSILONS`.

    Args:
        plan: a private plan.
    """
    least = math.ceil(plan.expected_batch / MOST_SAMPLING_RATE)
    table = Table(box=None, pad_edge=False, padding=(0, 2), title_justify="left", title=(
        f"with fewer than {least:,} a client refuses: --batch-size {plan.expected_batch} would sample too often"))
    for column in ("declared size", "sampling rate", "δ", *(f"ε {epsilon:g}: σ" for epsilon in EPSILONS)):
        table.add_column(column, justify="right", no_wrap=True)
    for size in (size for size in sorted({least, *SIZES}) if size >= least):
        budgets = [Budget.declare(size, epsilon=epsilon, declared_size=size) for epsilon in EPSILONS]
        table.add_row(f"{size:,}", short(budgets[0].sampling_rate(plan.expected_batch)),
                      short(budgets[0].delta, up=True),
                      *(_noise(plan, budget) for budget in budgets))
    return table


def _noise(plan: RunPlan, budget: Budget) -> str:
    """Return the noise that a budget calls for, and with secure aggregation the ε that it makes of the sums."""
    sigma, foretold = _foretold(plan, budget)
    return short(sigma) if foretold is None else f"{short(sigma)} (sums: ε {four_digits(foretold)})"


def _foretold(plan: RunPlan, budget: Budget) -> tuple[float, float | None]:
    """Return the noise multiplier that a budget calls for, and the ε of the sums if all members are alike.

    The ε is None without secure aggregation.

    Raises:
        ValueError: no noise keeps the budget.
    """
    sigma = mechanism_named(plan.mechanism).calibrate(budget, plan, plan.clip_norm).own
    if not plan.secure_aggregation:
        return sigma, None
    return sigma, foretold_epsilon(sigma, budget.sampling_rate(plan.expected_batch), plan.most_trainings, budget.delta,
                                   members=plan.least_members, colluding=plan.colluding)


def assumed(plan: RunPlan) -> str:
    """Say what the ε of sums assumes in this plan, where it is foretold."""
    return (f"ε in the sums holds against whoever sees the sums alone, if {plan.least_members} clients take part, all "
            f"add as much noise, and at most {plan.colluding} of them tell the server what they know: then each sum "
            f"has the noise of {honest(plan.least_members, plan.colluding)} honest clients.")


def noise_of(plan: RunPlan, budgets: Mapping[str, Budget]) -> Table:
    """Return a table with the noise of clients whose budgets are known, one row for each different budget.

    Args:
        plan: a private plan.
        budgets: client name → its budget.

    Raises:
        ValueError: no noise keeps a budget.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    sums = ("ε in the sums",) if plan.secure_aggregation else ()
    for column in ("clients", "declared size", "sampling rate", "σ", "ε of the run", *sums, "δ"):
        table.add_column(column, justify="right", no_wrap=True)
    steps = plan.most_trainings * plan.local_steps
    for budget in dict.fromkeys(budgets.values()):
        rate, (sigma, foretold) = budget.sampling_rate(plan.expected_batch), _foretold(plan, budget)
        epsilon = Accountant((Spend(sigma, rate, steps),)).epsilon(budget.delta)
        table.add_row(str(sum(other == budget for other in budgets.values())), f"{budget.declared_size:,}",
                      short(rate), short(sigma), four_digits(epsilon),
                      *(() if foretold is None else (four_digits(foretold),)), short(budget.delta, up=True))
    return table
