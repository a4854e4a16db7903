"""The summary of a run that has ended: strategy, figures before and after, bytes, time, and where the adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedlora import figures
from fedlora.quantities import decimal, duration, quantity


def summary(report: Mapping[str, Any], more: Mapping[str, str] | None = None, *, adapter: Path | None = None,
            seconds: float | None = None) -> Table:
    """Return the summary as a table.

    Args:
        report: the content of report.json.
        more: further lines by their titles, to stand after the figures.
        adapter: the adapter's folder; None leaves the line out.
        seconds: how long it took; None for the sum of the rounds.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    for title, value in {**_lines(report), **(more or {})}.items():
        table.add_row(title, Text(value, style="bold" if title.endswith(" after") else ""))
    moved, took = report["bytes"], report["seconds"] if seconds is None else seconds
    table.add_row("bytes up, down", f"{quantity(moved['up'])}, {quantity(moved['down'])}")
    table.add_row("time" if seconds is not None else "time of the rounds", duration(took))
    if adapter is not None:
        table.add_row("adapter", Text(str(adapter), overflow="fold"))
    return table


def _lines(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines about the run and its first figure, by their titles."""
    plan, evaluation = report["plan"], report["evaluation"]
    planned = "" if report["finished_rounds"] == plan["rounds"] else f" of {plan['rounds']}"
    lines = {"strategy": f"{plan['strategy']}, rank {plan['rank']}, {report['finished_rounds']}{planned} rounds"}
    if evaluation is None:
        return lines
    before, after = evaluation["before"] or {}, evaluation["after"]
    name = next(iter(figures.headline(after)), None)
    if name is None:
        return lines
    title = figures.title(name)
    if name in before:
        lines[f"{title} before"] = _decimal(before[name])
    if evaluation["after_round"]:
        ends = [after[f"{name}/{end}"] for end in ("low", "high") if f"{name}/{end}" in after]
        lines[f"{title} after"] = _decimal(after[name]) + (
            f" ({_decimal(ends[0])} to {_decimal(ends[1])})" if len(ends) == 2 else "")
    if f"{name}/majority" in after:
        lines["most frequent label alone"] = _decimal(after[f"{name}/majority"])
    return lines


def _decimal(value: float | str) -> str:
    """Write a figure; report.json holds those that are not finite as text."""
    return value if isinstance(value, str) else decimal(value)
