"""The picture of a run's privacy spending: ε against rounds, as a self-contained SVG file.

The file is plain text, without a script, and needs no font or image from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora import style, svg
from fedlora.privacy import four_digits, short
from fedlora.style import GRID, INK, LIMIT, PAPER

WIDTH, HEIGHT = 720, 432
LEFT, RIGHT, TOP, BOTTOM = 72, 700, 48, 376
"""Edges of the plotting area, in pixels of the 720 × 432 canvas. SVG counts y downwards: TOP < BOTTOM."""

SPENT, PLANNED = style.LEARNED, style.FAINT


def spending_chart(title: str, delta: float, planned: Sequence[tuple[int, float]], started: int) -> str:
    """Draw ε against rounds started, with the run's guarantee as a horizontal line.

    Args:
        title: names the data set and the run. It is escaped, so it may hold any characters.
        delta: the run's δ, for the label of the vertical axis.
        planned: (number of rounds, ε after so many rounds), in ascending order, at least one. The last one is the run's
            maximum, with ε > 0. `started` is one of the numbers.
        started: number of rounds that this client has started.

    Returns:
        The SVG document.
    """
    most, guarantee = planned[-1]
    spent = [point for point in planned if point[0] <= started]
    y_ticks, x_ticks = svg.ticks(0, guarantee * 1.06, 6), svg.ticks(0, most, 8, whole=True)
    right_end, top_end = most * 1.03, max(guarantee * 1.06, y_ticks[-1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        rounds, epsilon = point
        return (LEFT + (RIGHT - LEFT) * rounds / right_end, BOTTOM - (BOTTOM - TOP) * epsilon / top_end)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
             svg.text((LEFT + RIGHT) / 2, 28, title, size=16)]
    for tick in y_ticks:
        y = place((0, tick))[1]
        parts += [svg.line([(LEFT, y), (RIGHT, y)], GRID),
                  svg.text(LEFT - 8, y + 4, svg.number(tick, y_ticks), anchor="end")]
    for tick in x_ticks:
        x = place((tick, 0))[0]
        parts += [svg.line([(x, BOTTOM), (x, BOTTOM + 5)], INK), svg.text(x, BOTTOM + 20, f"{tick:g}")]
    parts += [svg.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], INK),
              svg.text((LEFT + RIGHT) / 2, HEIGHT - 14, "rounds started", size=14),
              svg.text(22, (TOP + BOTTOM) / 2, f"ε at δ = {short(delta, up=True)}", size=14, turned=True),
              svg.line(map(place, planned), PLANNED, width=2, dash="7 4"),
              svg.line([place((0, guarantee)), place((right_end, guarantee))], LIMIT, width=1.5),
              svg.line(map(place, spent), SPENT, width=2.5)]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{SPENT}"/>' for x, y in map(place, spent)]
    spent_so_far, at_most = four_digits(spent[-1][1]), four_digits(guarantee)
    parts += _legend([(SPENT, "", f"{_rounds(started)} started: ε {spent_so_far}"),
                      (PLANNED, "7 4", "if every round is started"),
                      (LIMIT, "", f"guarantee for {_rounds(most)}: ε {at_most}")])
    return "\n".join([
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, \'DejaVu Sans\', Helvetica, Arial, sans-serif">',
        f"<title>{svg.written(title)}: ε {spent_so_far} spent of {at_most}</title>", *parts, "</svg>\n"])


def _rounds(count: int) -> str:
    return f"{count} round" + ("s" if count != 1 else "")


def _legend(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    """Explain the lines (colour, dashes, words) in the lower right corner, which an increasing curve leaves free."""
    x, y = 430, BOTTOM - 20 * len(entries) - 6
    parts = [f'<rect x="{x - 10}" y="{y - 6}" width="{RIGHT - x + 6}" height="{20 * len(entries) + 6}" rx="4" '
             f'fill="{PAPER}" fill-opacity="0.85"/>']
    for index, (colour, dash, words) in enumerate(entries):
        middle = y + 8 + 20 * index
        parts += [svg.line([(x, middle), (x + 28, middle)], colour, width=2.5, dash=dash),
                  svg.text(x + 36, middle + 4, words, anchor="start")]
    return parts
