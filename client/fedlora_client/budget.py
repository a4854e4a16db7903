"""fedlora-client budget: what was spent on which data set, when and by which run, and what is left."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.privacy import Accountant, Charge, Ledger, Lifetime, Policy, four_digits
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS, Book, Declaration

from . import paths

AHEAD = (1, 5, 20)
"""Numbers of further rounds whose price is shown where none is asked for."""


def show_budget(*, policy: Path | None, simulated_ledger: Path | None, rounds: int | None, as_json: bool) -> int:
    """Show the ledger; returns the exit code.

    Args:
        rounds: what so many more would cost; None for some usual numbers.
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
    """The book under the policy's limits, which the next run will declare."""
    for known in policy.datasets.values():
        last = book.declared(known.id)
        orders = last.orders if last else FILTER_ORDERS
        book.limit(known.id, Declaration(time.time(), known.epsilon, known.delta, orders, known.distinct, known.unit))
    return book


def describe(ledger: Ledger, book: Book, dataset: str, ahead: Sequence[int]) -> dict:
    """One data set's spending, as JSON: lifetime, runs in order, and the price of further rounds like the last.

    Shown apart are the updates released, what is charged (for trainings that were begun) and what is reserved (counts
    against the lifetime: the planned maximum of a run that lasts, or that closed the budget).

    Args:
        book: of the ledger, under the limits that count now.
        ahead: numbers of further rounds; where there is no price for them, `no_forecast` says why.
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
            "no_forecast": why_not}


def _no_forecast(own: Sequence[Sequence[Charge]], lifetime: Lifetime) -> str | None:
    """Why there is no price of further rounds, as a sentence; None where there is one."""
    if lifetime.closed_by is not None:
        return (f"run {lifetime.closed_by} closed the budget, and no round more fits before its epsilon is raised in "
                "the policy")
    if not own:
        return "no run has been charged yet, and a round's price is that of the last run's"
    if own[-1][0].terms.noise_multiplier is None:
        return "the last run had no noise, and another round like its own costs an infinite ε"
    return None


def runs_of(ledger: Ledger, dataset: str) -> list[list[Charge]]:
    """The charges of each run, in order; those that cost nothing are left out."""
    runs: dict[str, list[Charge]] = {}
    for charge in ledger.charges(dataset):
        if charge.state != "voided":
            runs.setdefault(charge.run_id, []).append(charge)
    return list(runs.values())


def _released(charges: Sequence[Charge]) -> int:
    return sum(charge.state == "released" for charge in charges)


def _run(ledger: Ledger, book: Book, charges: Sequence[Charge]) -> dict:
    first, terms = charges[0], charges[0].terms
    epsilon = _finite(ledger.epsilon(first.dataset, first.run_id))
    held = terms.spends(book.runs[first.dataset, first.run_id].committed)
    reserved = math.inf if held is None else Accountant(held).epsilon(terms.delta or 0.0)
    return {"run": first.run_id, "first": _time(first.time), "last": _time(charges[-1].time), "rounds": len(charges),
            "steps": sum(charge.steps for charge in charges), "noise_multiplier": terms.noise_multiplier,
            "sampling_rate": terms.sampling_rate, "delta": terms.delta, "unit": terms.unit,
            "updates_released": _released(charges), "epsilon": epsilon, "charged": epsilon,
            "reserved": _finite(reserved)}


def _show(console: Console, name: str, about: dict) -> None:
    counts = f"updates released: {about['updates_released']}; ε {_text(about['charged'])} charged"
    limit = f"no lifetime budget; {counts}" if about["epsilon"] is None else (
        f"{counts}, {_text(about['reserved'])} reserved of its lifetime's {about['epsilon']} (RDP, δ "
        f"{about['delta']:g}), {_text(about['remaining'], down=True)} left")
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
    for rounds, spent in about["spent_after_further_rounds"].items():
        beyond = isinstance(about["epsilon"], float) and (spent == "inf" or spent > about["epsilon"])
        console.print(f"charged after {rounds} more rounds like the last: ε {_text(spent)}"
                      f"{', more than its lifetime has' if beyond else ''}", highlight=False)
    if about["no_forecast"]:
        console.print(f"no forecast: {about['no_forecast']}", highlight=False)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "inf"


def _text(value: float | str | None, *, down: bool = False) -> str:
    return four_digits(value, down=down) if isinstance(value, float) else str(value)
