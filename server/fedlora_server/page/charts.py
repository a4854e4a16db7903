"""The page's charts: curves and bars over the rounds, as inline SVG. Colours are the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora import figures, style, svg
from fedlora.quantities import duration, quantity
from fedlora_server.curves import panels_of, points_of, story
from fedlora_server.observer import RoundRecord

WIDTH, HEIGHT = 400, 222
LEFT, RIGHT, TOP, BOTTOM = 54, 392, 10, 184
"""Edges of the plotting area, in pixels of the canvas. SVG counts y downwards: TOP < BOTTOM."""
MOST_POINTS = 300
"""Most points or bars of a chart. Of more rounds, the means of equally many are shown."""
FEW_BARS = 60
"""Most bars with gaps between them."""
INTERVAL = "95 % interval"

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """A curve, or a group of bars.

    Attributes:
        title: what it shows, for the legend.
        points: (round, value).
        low: (round, value) of the lower end of its interval; () without one.
        high: the same of the upper end.
        colour: one of `fedlora.style`'s colours; "" for the next of the cycle.
    """

    title: str
    points: Points
    low: Points = ()
    high: Points = ()
    colour: str = ""


@dataclass(frozen=True)
class Area:
    """The plotting area's scales: rounds from `first` to `last`, values from `low` to `high`."""

    first: float
    last: float
    low: float
    high: float

    def x(self, round: float) -> float:
        """Return a round's place, in pixels from the left."""
        return LEFT + (RIGHT - LEFT) * (round - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """Return a value's place, in pixels from the top."""
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def charts(records: Sequence[RoundRecord]) -> list[str]:
    """Return the charts of a run as HTML figures: those of the evaluation, update norms, traffic and time.

    Args:
        records: the run's records. Charts without a point are left out.
    """
    if not records:
        return []
    last, drawn = records[-1].round, []
    for names in panels_of(records):
        curves = [Curve(f"{figures.title(name)}: {story(points_of(name, records), last)}", points_of(name, records),
                        points_of(f"{name}/low", records), points_of(f"{name}/high", records),
                        style.LOSS if name == "loss" else "") for name in names]
        majority = points_of(f"{names[0]}/majority", records)
        drawn.append(_lines("further figures" if len(names) > 1 else curves[0].title, curves, last,
                            majority[-1][1] if majority else None))
    trained = [record for record in records if record.round]
    norms = [(record.round, record.update_norm) for record in trained if record.update_norm is not None]
    if norms:
        drawn.append(_lines(f"update norm (L2, trained tensors): {norms[-1][1]:.3g} in round {norms[-1][0]}",
                            [Curve("", norms, colour=style.MOVED)], last, floor=0.0))
    if trained:
        up, down = sum(r.bytes_up for r in trained), sum(r.bytes_down for r in trained)
        drawn.append(_bars("bytes in each round, of all clients", [
            Curve(f"up, {quantity(up)} in all", [(r.round, r.bytes_up) for r in trained], colour=style.UP),
            Curve(f"down, {quantity(down)} in all", [(r.round, r.bytes_down) for r in trained], colour=style.DOWN)],
            last, in_bytes=True))
        drawn.append(_bars(f"seconds in each round: {duration(sum(r.seconds for r in trained))} in all",
                           [Curve("", [(r.round, r.seconds) for r in trained], colour=style.TIME)], last))
    return drawn


def _thinned(points: Points) -> Points:
    """Return at most `MOST_POINTS` points: the means of equally many rounds, at the last of them."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[at:at + size] for at in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _lines(title: str, curves: Sequence[Curve], last: int, level: float | None = None,
           floor: float | None = None) -> str:
    curves = [Curve(c.title, _thinned(c.points), _thinned(c.low), _thinned(c.high), c.colour) for c in curves]
    values = [value for c in curves for points in (c.points, c.low, c.high) for _, value in points
              if math.isfinite(value)] + ([] if level is None else [level])
    if not values:
        return _figure(title, "", [])
    low, high = min(values) if floor is None else floor, max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    area = Area(min(0.0, *(c.points[0][0] for c in curves)), max(last, 1),
                max(0.0, low - room) if low >= 0 else low - room,
                min(1.0, high + room) if 0 <= low <= high <= 1 else high + room)
    parts, faint = _axes(area), 0.18 if len(curves) == 1 else 0.1
    for index, curve in enumerate(curves):
        look = style.series(index, curve.colour)
        colour = _paint(look.colour)
        if curve.low and len(curve.low) == len(curve.high):
            edge = [*curve.high, *reversed(curve.low)]
            if all(math.isfinite(value) for _, value in edge):
                parts.append(f'<path d="{_path(edge, area)}Z" fill="{colour}" opacity="{faint}"/>')
    if level is not None:
        y = area.y(level)
        parts += [svg.line([(LEFT, y), (RIGHT, y)], "currentColor", dash="2 3"),
                  svg.text(RIGHT, y - 4, f"most frequent label alone: {level:.3f}", size=11, anchor="end",
                           colour="currentColor")]
    for index, curve in enumerate(curves):
        look = style.series(index, curve.colour)
        colour = _paint(look.colour)
        dash = f' stroke-dasharray="{_dash(look)}"' if look.dashes else ""
        parts.append(f'<path d="{_path(curve.points, area)}" fill="none" stroke="{colour}" '
                     f'stroke-width="{look.width:g}" stroke-linejoin="round"{dash}/>')
        if len(curve.points) <= style.MARKED:
            parts += [_marker(look, area.x(at), area.y(value)) for at, value in curve.points if math.isfinite(value)]
    legend = [(_sample(style.series(index, curve.colour)), curve.title) for index, curve in enumerate(curves)
              ] if len(curves) > 1 else []
    shade = "currentColor" if len(curves) > 1 else _paint(style.series(0, curves[0].colour).colour)
    if any(c.low for c in curves):
        legend.append(('<svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true"><rect width="28" '
                       f'height="10" fill="{shade}" opacity="0.18"/></svg>', INTERVAL + "s" * (len(curves) > 1)))
    return _figure(title, "".join(parts), legend)


def _bars(title: str, stacked: Sequence[Curve], last: int, in_bytes: bool = False) -> str:
    groups = [_thinned(curve.points) for curve in stacked]
    totals = [sum(values) for values in zip(*([value for _, value in points] for points in groups), strict=True)]
    area = Area(0.5, max(last, 1) + 0.5, 0.0, 1.08 * max(totals) or 1.0)
    parts = _axes(area, in_bytes=in_bytes)
    wide = 0.36 if len(totals) <= FEW_BARS else 0.5  # many bars touch each other
    half, below = wide * (last / len(totals) if last else 1), [0.0] * len(totals)
    for curve, points in zip(stacked, groups, strict=True):
        d = []
        for index, (at, value) in enumerate(points):
            x, foot, top = area.x(at - half), area.y(below[index]), area.y(below[index] + value)
            d.append(f"M{x:.1f} {foot:.1f}V{top:.1f}H{area.x(at + half):.1f}V{foot:.1f}")
            below[index] += value
        parts.append(f'<path d="{"".join(d)}" fill="{_paint(curve.colour)}"/>')
    return _figure(title, "".join(parts), [(
        f'<svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true"><rect width="28" height="10" '
        f'fill="{_paint(curve.colour)}"/></svg>', curve.title) for curve in stacked if curve.title])


def _axes(area: Area, *, in_bytes: bool = False) -> list[str]:
    parts, heights = [], svg.ticks(area.low, area.high, 5)
    for value in heights:
        y = area.y(value)
        told = quantity(value).replace(".0 ", " ") if in_bytes else f"{value:.3g}" if abs(value) >= 1e5 else svg.number(
            value, heights)
        parts += [svg.line([(LEFT, y), (RIGHT, y)], "var(--grid)"),
                  svg.text(LEFT - 6, y + 4, told, size=11, anchor="end", colour="currentColor")]
    for value in svg.ticks(area.first, area.last, 7, whole=True):
        parts.append(svg.text(area.x(value), BOTTOM + 17, f"{value:.0f}", size=11, colour="currentColor"))
    return parts


def _path(points: Points, area: Area) -> str:
    """Return a path through the finite points; it is interrupted where a value is not finite."""
    words, pen = [], "M"
    for at, value in points:
        if math.isfinite(value):
            words.append(f"{pen}{area.x(at):.1f} {area.y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(words)


def _marker(look: style.Series, x: float, y: float) -> str:
    """Return the marker of a point, of about the size that it has in the other pictures."""
    r = 0.55 * look.width + 1.6
    shapes = {"s": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "^": ((0, -1.2), (1.1, 1), (-1.1, 1)),
              "D": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)), "v": ((0, 1.2), (1.1, -1), (-1.1, -1)),
              "P": ((-.4, -1), (.4, -1), (.4, -.4), (1, -.4), (1, .4), (.4, .4), (.4, 1), (-.4, 1), (-.4, .4),
                    (-1, .4), (-1, -.4), (-.4, -.4))}
    if look.marker not in shapes:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{_paint(look.colour)}"/>'
    corners = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in shapes[look.marker])
    return f'<polygon points="{corners}" fill="{_paint(look.colour)}"/>'


def _sample(look: style.Series) -> str:
    dash = f' stroke-dasharray="{_dash(look)}"' if look.dashes else ""
    return (f'<svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true"><path d="M0 5H28" '
            f'stroke="{_paint(look.colour)}" stroke-width="{look.width:g}"{dash}/>{_marker(look, 14, 5)}</svg>')


def _dash(look: style.Series) -> str:
    return " ".join(f"{length:g}" for length in look.dashes)


def _paint(colour: str) -> str:
    """Return a colour of `fedlora.style` as the page names it, so that it can differ where the page is dark."""
    return f"var(--c{colour[1:]})"


def _figure(title: str, content: str, legend: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<li>{sample} {svg.written(words)}</li>" for sample, words in legend)
    told = "; ".join([title, *(words for _, words in legend)])
    return (f"<figure><figcaption>{svg.written(title)}</figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{svg.written(told)}">{content}'
            f'{svg.text((LEFT + RIGHT) / 2, HEIGHT - 4, "round", size=11, colour="currentColor")}</svg>'
            f'{f"<ul class=legend>{lines}</ul>" if lines else ""}</figure>')
