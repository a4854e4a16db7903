"""The curves of a run: which figures share a panel, their points, and what a panel says in words."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora import figures
from fedlora.quantities import decimal

from .observer import RoundRecord


def panels_of(records: Sequence[RoundRecord]) -> list[list[str]]:
    """Return the names of the figures that share a panel, panel by panel.

    The task's first figure and the loss have their own. Of the others, those between 0 and 1 share one.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in figures.headline(record.evaluation).items():
            values.setdefault(name, []).append(value)
    first, *others = [name for name in values if name != "loss"] or [""]
    shares = [name for name in others if all(0 <= value <= 1 for value in values[name])]
    panels = [[first], shares, *([name] for name in others if name not in shares), ["loss"]]
    return [panel for panel in panels if panel and panel[0] in values]


def points_of(name: str, records: Sequence[RoundRecord]) -> list[tuple[int, float]]:
    """Return (round, value) of a figure for each round that has it."""
    return [(record.round, record.evaluation[name]) for record in records if name in record.evaluation]


def story(points: Sequence[tuple[int, float]], last: int) -> str:
    """Return a curve in words, as in "0.500 before, 0.812 after".

    Args:
        points: (round, value), at least one.
        last: number of the last finished round.
    """
    first, value = points[0]
    before = "" if first or len(points) == 1 else f"{decimal(value)} before, "
    end, value = points[-1]
    return f"{before}{decimal(value)} " + ("before" if end == 0 else "after" if end == last else f"after round {end}")
