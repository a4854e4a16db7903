"""The command fedlora-client budget: show what was spent on which data set, by which run, and what is left."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.plan.limits import AGGREGATE, LOCAL
from fedlora.privacy import Charge, Ledger, Lifetime, Policy, four_digits, short
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS, Book, Declaration, Run
from fedlora.privacy.ledger.rosters import aggregate_epsilon
from fedlora.privacy.mechanisms import mechanism_named

from . import paths

CHARGED = {"local": "its own noise", "aggregate": "the noise of the sums"}
NOT_STATED = "no ε stated (the members' keys are not all in policy.toml)"
AHEAD = (1, 5, 20)
"""Numbers of further rounds whose cost is shown where --rounds is not given."""


class RunSpending(TypedDict):
    """One run's spending, as `fedlora-client budget --json` prints it. "inf" stands for an infinite ε.

    `rounds` counts the trainings that were begun; `charged` is their ε, at the run's own δ, and `epsilon` is the same
    number. `reserved` is the ε that counts against the lifetime. `local` is the ε of this client's own noise, and
    `aggregate` that of secure sums: None without them, or where their members are not pinned. `charges` says which of
    the two is charged, and `rosters` with whom the sums were made.
    """

    run: str
    first: str
    last: str
    rounds: int
    steps: int
    noise_multiplier: float | None
    sampling_rate: float
    delta: float | None
    unit: str
    updates_released: int
    epsilon: float | str | None
    charged: float | str | None
    reserved: float | str | None
    mechanism: str
    charges: str
    local: float | str | None
    aggregate: float | str | None
    rosters: list[dict[str, Any]]


class BothEpsilons(TypedDict):
    """The two ε of a run with secure sums, as in `RunSpending`."""

    local: float | str | None
    aggregate: float | str | None


class DatasetSpending(TypedDict):
    """One data set's spending, as `fedlora-client budget --json` prints it; see `describe`."""

    epsilon: float | str | None
    delta: float | None
    spent: float | str | None
    charged: float | str | None
    reserved: float | str | None
    updates_released: int
    remaining: float | str | None
    closed_by: str | None
    overlapping: list[str]
    runs: list[RunSpending]
    last_run_after_further_rounds: dict[str, BothEpsilons]
    spent_after_further_rounds: dict[str, float | str | None]
    no_forecast: str | None


def show_budget(*, policy: Path | None, simulated_ledger: Path | None, rounds: int | None, as_json: bool) -> int:
    """Print what the ledger holds, and return the command's exit code.

    Args:
        policy: the policy file with the limits; None for the user's own.
        simulated_ledger: folder of a simulated ledger to show; None for the user's real one.
        rounds: show the cost of this many further rounds; None for 1, 5 and 20.
        as_json: print JSON instead of tables.
    """
    folder = simulated_ledger
    try:
        path = folder / "ledger.sqlite" if folder else paths.ledger()
        if not path.exists():
            print(f"fedlora-client: there is no ledger at {path}: nothing was spent by this user on this machine",
                  file=sys.stderr)
            return 0
        limits = Policy.read(paths.named_policy(policy, folder))
        ledger = Ledger(path, simulated=folder is not None)
        book = _with_limits(ledger.book(), limits)
        names = sorted({charge.dataset for charge in ledger.charges()} | book.declarations.keys())
        ahead = AHEAD if rounds is None else (rounds,)
        described = {name: describe(ledger, book, name, ahead) for name in names}
    except ValueError as error:
        print(f"fedlora-client: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fedlora-client: {error.filename or 'the ledger'}: {error.strerror or error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps({"ledger": ledger.ledger_id, "simulated": ledger.simulated, "datasets": described}, indent=1))
        return 0
    console = Console(markup=False)
    console.print(f"Ledger {ledger.ledger_id}" + (", simulated" if ledger.simulated else ""), highlight=False)
    for name, about in described.items():
        _show(console, name, about)
    if not described:
        console.print("no data set has been charged yet", highlight=False)
    return 0


def _with_limits(book: Book, policy: Policy) -> Book:
    """Put the policy's limits into the book: the next run will declare them, whatever the ledger has now."""
    for known in policy.datasets.values():
        last = book.declared(known.id)
        orders = last.orders if last else FILTER_ORDERS
        book.limit(known.id, Declaration(time.time(), known.epsilon, known.delta, orders, known.distinct, known.unit))
    return book


def describe(ledger: Ledger, book: Book, dataset: str, ahead: Sequence[int]) -> DatasetSpending:
    """Return one data set's spending: its lifetime budget, its runs in order and the cost of further rounds.

    Three quantities are kept apart. Updates released: uploads that left this machine. Charged: ε of the trainings that
    were begun. Reserved: ε that counts against the lifetime; for a run that still lasts, or that closed the budget,
    that is the ε of the most trainings that it may begin.

    Args:
        ledger: the ledger to read.
        book: the ledger's book, under the limits that count now.
        dataset: id of the data set.
        ahead: numbers of further rounds like those of the last run. Where their cost cannot be told, `no_forecast`
            says why.
    """
    lifetime, own = book.lifetime(dataset), runs_of(ledger, dataset)
    prices, why_not = {}, _no_forecast(own, lifetime)
    if why_not is None:
        last = own[-1][0].terms
        prices = {str(rounds): _finite(book.spent_after(dataset, last.spends(rounds) or ())) for rounds in ahead}
    return {"epsilon": _finite(lifetime.epsilon), "delta": lifetime.delta, "spent": _finite(lifetime.spent),
            "charged": _finite(lifetime.charged), "reserved": _finite(lifetime.committed),
            "updates_released": sum(map(_released, own)), "remaining": _finite(lifetime.remaining),
            "closed_by": lifetime.closed_by, "overlapping": list(book.overlapping(dataset)),
            "runs": [_run(ledger, book, run) for run in own], "spent_after_further_rounds": prices,
            "last_run_after_further_rounds": _both_ahead(book, own, ahead) if why_not is None else {},
            "no_forecast": why_not}


def _both(run: Run, trainings: int) -> BothEpsilons:
    """Return the two ε of a number of trainings of a run; no aggregate one without sums of pinned members."""
    terms = run.terms
    aggregate = None
    if terms.delta is not None:
        aggregate = aggregate_epsilon(tuple(run.rosters.values()), terms.sampling_rate, terms.delta, trainings)
    return {"local": _finite(terms.own().epsilon(trainings)), "aggregate": _finite(aggregate)}


def _both_ahead(book: Book, own: Sequence[Sequence[Charge]], ahead: Sequence[int]) -> dict[str, BothEpsilons]:
    """Return the two ε of the last run after further rounds; {} if it has no secure sums."""
    last = own[-1][0]
    run = book.runs[last.dataset, last.run_id]
    if run.terms.mechanism != AGGREGATE:
        return {}
    return {str(rounds): _both(run, run.begun + rounds) for rounds in ahead}


def _no_forecast(own: Sequence[Sequence[Charge]], lifetime: Lifetime) -> str | None:
    """Say why the cost of further rounds cannot be told; None if it can."""
    if lifetime.closed_by is not None:
        return (f"run {lifetime.closed_by} closed the budget; no further round fits unless epsilon is raised in the "
                "policy")
    if not own:
        return "no run has been charged yet, and the forecast is for rounds like those of the last run"
    if own[-1][0].terms.noise_multiplier is None:
        return "the last run had no noise, and another round like its rounds costs an infinite ε"
    return None


def runs_of(ledger: Ledger, dataset: str) -> list[list[Charge]]:
    """Return a data set's charges, one list per run, in order. Voided charges, which cost nothing, are left out."""
    runs: dict[str, list[Charge]] = {}
    for charge in ledger.charges(dataset):
        if charge.state != "voided":
            runs.setdefault(charge.run_id, []).append(charge)
    return list(runs.values())


def _released(charges: Sequence[Charge]) -> int:
    return sum(charge.state == "released" for charge in charges)


def _run(ledger: Ledger, book: Book, charges: Sequence[Charge]) -> RunSpending:
    first, terms = charges[0], charges[0].terms
    epsilon = _finite(ledger.epsilon(first.dataset, first.run_id))
    run = book.runs[first.dataset, first.run_id]
    both = _both(run, run.begun)
    return {"run": first.run_id, "first": _time(first.time), "last": _time(charges[-1].time), "rounds": len(charges),
            "steps": sum(charge.steps for charge in charges), "noise_multiplier": terms.noise_multiplier,
            "sampling_rate": terms.sampling_rate, "delta": terms.delta, "unit": terms.unit,
            "updates_released": _released(charges), "epsilon": epsilon, "charged": epsilon,
            "reserved": _finite(terms.epsilon(run.committed)), "mechanism": terms.mechanism,
            "charges": terms.charged,
            "local": both["local"], "aggregate": both["aggregate"],
            "rosters": [{**asdict(roster), "honest": roster.honest} for roster in run.rosters.values()]}


def _show(console: Console, name: str, about: DatasetSpending) -> None:
    counts = f"updates released: {about['updates_released']}; ε {_text(about['charged'])} charged"
    limit = f"no lifetime budget; {counts}" if about["epsilon"] is None else (
        f"{counts}, {_text(about['reserved'])} reserved of its lifetime budget of {_brief(about['epsilon'])} (RDP, "
        f"δ {short(about['delta'] or 0.0, up=True)}), {_text(about['remaining'], down=True)} left")
    console.print(Text.assemble("\n", (name, "bold"), f": {limit}"))
    if about["overlapping"]:
        console.print(f"shares records with {', '.join(about['overlapping'])}, whose spending counts here too",
                      highlight=False)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("run", "begun", "rounds", "released", "ε charged", "ε reserved", "σ"):
        table.add_column(column, justify="left" if column in ("run", "begun") else "right", no_wrap=True)
    for run in about["runs"]:
        sigma = "none" if run["noise_multiplier"] is None else f"{run['noise_multiplier']:.3f}"
        table.add_row(run["run"], run["first"][:-3], str(run["rounds"]), str(run["updates_released"]),
                      _text(run["charged"]), _text(run["reserved"]), sigma)
    if about["runs"]:
        console.print(table)
    _show_sums(console, about)
    for rounds, spent in about["spent_after_further_rounds"].items():
        epsilon = about["epsilon"]
        beyond = isinstance(epsilon, float) and (spent == "inf" or (isinstance(spent, float) and spent > epsilon))
        console.print(f"charged after {rounds} more rounds like the last: ε {_text(spent)}"
                      f"{', more than its lifetime budget' if beyond else ''}", highlight=False)
    if about["no_forecast"]:
        console.print(f"no forecast: {about['no_forecast']}", highlight=False)


def _show_sums(console: Console, about: DatasetSpending) -> None:
    """Show both ε of each run with secure sums, what further rounds would make of them, and what each assumes."""
    runs = [run for run in about["runs"] if run["mechanism"] == AGGREGATE]
    for run in runs:
        members = sorted({f"{one['honest']} honest of {one['members']}" for one in run["rosters"]})
        console.print(f"run {run['run']} has secure sums, with {', '.join(members) or 'no'} members; "
                      f"{CHARGED[run['charges']]} is charged: {_of_both(run)}", highlight=False)
    for rounds, both in about["last_run_after_further_rounds"].items():
        console.print(f"that run after {rounds} more rounds: {_of_both(both)}", highlight=False)
    if runs:
        console.print(f"By own noise: {mechanism_named(LOCAL).promise}\n"
                      f"In the sums: {mechanism_named(AGGREGATE).promise}", highlight=False, soft_wrap=True)


def _of_both(both: BothEpsilons | RunSpending) -> str:
    aggregate = NOT_STATED if both["aggregate"] is None else f"ε {_text(both['aggregate'])}"
    return f"ε {_text(both['local'])} by own noise, {aggregate} in the sums"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _finite(value: float | None) -> float | str | None:
    """Return the value for JSON, which has no infinity."""
    return value if value is None or math.isfinite(value) else "inf"


def _text(value: float | str | None, *, down: bool = False) -> str:
    return four_digits(value, down=down) if isinstance(value, float) else str(value)


def _brief(value: float | str) -> str:
    return short(value) if isinstance(value, float) else value
