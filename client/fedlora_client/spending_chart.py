"""The picture of a run's privacy spending: ε against rounds, as a self-contained SVG file.

The file is plain text, without a script, and needs no font or image from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from fedlora import style
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
    y_ticks, x_ticks = _ticks(guarantee * 1.06, 6), _ticks(most, 8, whole=True)
    right_end, top_end = most * 1.03, max(guarantee * 1.06, y_ticks[-1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        rounds, epsilon = point
        return (LEFT + (RIGHT - LEFT) * rounds / right_end, BOTTOM - (BOTTOM - TOP) * epsilon / top_end)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
             _text((LEFT + RIGHT) / 2, 28, title, size=16)]
    for tick in y_ticks:
        y = place((0, tick))[1]
        parts += [_line([(LEFT, y), (RIGHT, y)], GRID), _text(LEFT - 8, y + 4, _number(tick, y_ticks), anchor="end")]
    for tick in x_ticks:
        x = place((tick, 0))[0]
        parts += [_line([(x, BOTTOM), (x, BOTTOM + 5)], INK), _text(x, BOTTOM + 20, f"{tick:g}")]
    parts += [_line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], INK),
              _text((LEFT + RIGHT) / 2, HEIGHT - 14, "rounds started", size=14),
              _text(22, (TOP + BOTTOM) / 2, f"ε at δ = {short(delta, up=True)}", size=14, turned=True),
              _line(map(place, planned), PLANNED, width=2, dash="7 4"),
              _line([place((0, guarantee)), place((right_end, guarantee))], LIMIT, width=1.5),
              _line(map(place, spent), SPENT, width=2.5)]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{SPENT}"/>' for x, y in map(place, spent)]
    spent_so_far, at_most = four_digits(spent[-1][1]), four_digits(guarantee)
    parts += _legend([(SPENT, "", f"{_rounds(started)} started: ε {spent_so_far}"),
                      (PLANNED, "7 4", "if every round is started"),
                      (LIMIT, "", f"guarantee for {_rounds(most)}: ε {at_most}")])
    return "\n".join([
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, \'DejaVu Sans\', Helvetica, Arial, sans-serif">',
        f"<title>{_written(title)}: ε {spent_so_far} spent of {at_most}</title>", *parts, "</svg>\n"])


def _ticks(end: float, about: int, *, whole: bool = False) -> list[float]:
    """Return about so many round numbers (1, 2 or 5 times a power of ten apart) from 0 to `end`."""
    least = end / about
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    return [index * step for index in range(math.floor(end / step * (1 + 1e-9)) + 1)]


def _rounds(count: int) -> str:
    return f"{count} round" + ("s" if count != 1 else "")


def _number(value: float, ticks: Sequence[float]) -> str:
    """Write a tick with as many decimals as the distance between the ticks needs."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 0
    return f"{value:.{decimals}f}" if decimals <= 4 else f"{value:g}"


def _line(points: Iterable[tuple[float, float]], colour: str, *, width: float = 1.0, dash: str = "") -> str:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{turn}>'
            f"{_written(text)}</text>")


def _written(text: str) -> str:
    """Escape text for XML, which has no place for control characters at all."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))


def _legend(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    """Explain the lines (colour, dashes, words) in the lower right corner, which an increasing curve leaves free."""
    x, y = 430, BOTTOM - 20 * len(entries) - 6
    parts = [f'<rect x="{x - 10}" y="{y - 6}" width="{RIGHT - x + 6}" height="{20 * len(entries) + 6}" rx="4" '
             f'fill="{PAPER}" fill-opacity="0.85"/>']
    for index, (colour, dash, words) in enumerate(entries):
        middle = y + 8 + 20 * index
        parts += [_line([(x, middle), (x + 28, middle)], colour, width=2.5, dash=dash),
                  _text(x + 36, middle + 4, words, anchor="start")]
    return parts
