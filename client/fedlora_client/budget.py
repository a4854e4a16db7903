"""fedlora-client budget: what was spent on which data set, when and by which run, and what is left."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.privacy import Charge, Ledger, Policy
from fedlora.privacy.ledger.lifetime import FILTER_ORDERS, Book, Declaration

from . import places

AHEAD = (1, 5, 20)
"""Numbers of further rounds whose price is shown where none is asked for."""


def show_budget(options: Namespace) -> int:
    """Show the ledger; returns the exit code."""
    folder: Path | None = options.simulated_ledger
    path = folder / "ledger.sqlite" if folder else places.ledger()
    if not path.exists():
        print(f"fedlora-client: there is no ledger at {path}: nothing was spent by this user on this machine",
              file=sys.stderr)
        return 0
    try:
        policy = Policy.read(places.named_policy(options))
        ledger = Ledger(path, simulated=folder is not None)
        book = _with_limits(ledger.book(), policy)
        names = sorted({charge.dataset for charge in ledger.charges()} | book.declarations.keys())
        ahead = AHEAD if options.rounds is None else (options.rounds,)
        described = {name: describe(ledger, book, name, ahead) for name in names}
    except ValueError as error:
        print(f"fedlora-client: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"ledger": ledger.ledger_id, "simulated": ledger.simulated, "datasets": described}, indent=1))
        return 0
    console = Console(markup=False)
    console.print(f"Ledger {ledger.ledger_id}" + (", simulated" if ledger.simulated else ""), highlight=False)
    for name, about in described.items():
        _show(console, name, about)
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

    Args:
        book: of the ledger, under the limits that count now.
        ahead: numbers of further rounds; a closed budget has no price for them.
    """
    lifetime, own = book.lifetime(dataset), runs_of(ledger, dataset)
    prices = {}
    if own and lifetime.closed_by is None and (last := own[-1][0].terms).noise_multiplier is not None:
        prices = {str(rounds): _finite(book.spent_after(dataset, last.spends(rounds) or ())) for rounds in ahead}
    return {"epsilon": _finite(lifetime.epsilon), "delta": lifetime.delta, "spent": _finite(lifetime.spent),
            "remaining": _finite(lifetime.remaining), "closed_by": lifetime.closed_by,
            "overlapping": list(book.overlapping(dataset)), "runs": [_run(ledger, run) for run in own],
            "spent_after_further_rounds": prices}


def runs_of(ledger: Ledger, dataset: str) -> list[list[Charge]]:
    """The charges of each run, in order; those that cost nothing are left out."""
    runs: dict[str, list[Charge]] = {}
    for charge in ledger.charges(dataset):
        if charge.state != "voided":
            runs.setdefault(charge.run_id, []).append(charge)
    return list(runs.values())


def _run(ledger: Ledger, charges: Sequence[Charge]) -> dict:
    first, terms = charges[0], charges[0].terms
    return {"run": first.run_id, "first": _time(first.time), "last": _time(charges[-1].time), "rounds": len(charges),
            "steps": sum(charge.steps for charge in charges), "noise_multiplier": terms.noise_multiplier,
            "sampling_rate": terms.sampling_rate, "delta": terms.delta, "unit": terms.unit,
            "epsilon": _finite(ledger.epsilon(first.dataset, first.run_id))}


def _show(console: Console, name: str, about: dict) -> None:
    limit = "no lifetime budget" if about["epsilon"] is None else (
        f"ε {_text(about['spent'])} of {_text(about['epsilon'])} spent over its lifetime (RDP, δ {about['delta']:g}), "
        f"{_text(about['remaining'])} left" + (f"; closed by run {about['closed_by']}" if about["closed_by"] else ""))
    console.print(Text.assemble("\n", (name, "bold"), f": {limit}"))
    if about["overlapping"]:
        console.print(f"shares records with {', '.join(about['overlapping'])}, whose spending counts here too",
                      highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("run", "begun", "rounds", "ε of the run", "σ", "q"):
        table.add_column(column, justify="left" if column in ("run", "begun") else "right", no_wrap=True)
    for run in about["runs"]:
        sigma = "none" if run["noise_multiplier"] is None else f"{run['noise_multiplier']:.3f}"
        table.add_row(run["run"], run["first"], str(run["rounds"]), _text(run["epsilon"]), sigma,
                      f"{run['sampling_rate']:.4g}")
    if about["runs"]:
        console.print(table)
    for rounds, spent in about["spent_after_further_rounds"].items():
        console.print(f"spent after {rounds} more rounds like the last: ε {_text(spent)}", highlight=False)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "inf"


def _text(value: float | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
