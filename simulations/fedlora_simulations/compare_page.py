"""The page compare.html: the table, and pictures to point at, in one file that needs no network.

plotly draws the pictures in the reader's browser. Its script is in the page, once. Without the package, no page is
written (extra `compare`).
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora import style
from fedlora.figures import title
from fedlora_server.observer import jsonable

from .comparison import mean_and_deviation
from .pairing import Difference, Group
from .reference import Published, published_for
from .results import Result
from .tables import cells, compared

FILE = "compare.html"

MISSING = f"{FILE} is not written: it needs plotly (pip install 'fedlora[compare]', or plotly itself)"

SHOWN = 12
"""Curves that are shown at first; the others are shown by a click on their names."""
RUNS = 24
"""Most runs whose clients' own curves are in the page."""

DASHES = {(): "solid", (2, 2.5): "dot", (9, 3, 2, 3): "dashdot", (12, 5): "longdash"}
SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}

Trace = dict[str, Any]
Picture = tuple[str, str, list[Trace], dict[str, Any]]
"""Heading, a sentence below it, and plotly's traces and layout."""

_CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: INK; background: PAPER; max-width: 1100px; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin: 2em 0 0 }
p { margin: .2em 0; max-width: 75ch } .note { color: #555d66; font-size: .9em }
.wide { overflow-x: auto; margin: 1em 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid GRID; white-space: nowrap }
th { border-bottom: 2px solid INK } .word { text-align: left }
.plot { height: 430px } .plot.tall { height: 560px } .plot.own { height: auto }
@media print { .plot { break-inside: avoid } }
""".replace("INK", style.INK).replace("PAPER", style.PAPER).replace("GRID", style.GRID)

_DRAW = """
for (const [index, figure] of JSON.parse(document.getElementById("figures").textContent).entries())
  Plotly.newPlot("plot" + index, figure.data, figure.layout,
                 {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]});
"""


def available() -> bool:
    """Return whether plotly is installed, without importing it."""
    return importlib.util.find_spec("plotly") is not None


def page(groups: Sequence[Group], differences: Sequence[Difference], published: Sequence[Published],
         notes: Sequence[str], heading: str) -> str:
    """Return the page.

    Args:
        groups: the groups.
        differences: their differences from the baseline.
        published: published figures.
        notes: sentences below the table, without full stops.
        heading: the page's title.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs  # imported late: it is an extra, and takes a while

    pictures = _pictures(groups, differences, published)
    figures = json.dumps(jsonable([{"data": data, "layout": layout} for _, _, data, layout in pictures]))
    parts = [f"<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{_text(heading)}</title>",
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'; '
             'script-src \'unsafe-inline\'; img-src data: blob:">',
             f"<style>{_CSS}</style>\n</head>\n<body>\n<h1>{_text(heading)}</h1>",
             _table(groups, differences, published), *(f'<p class="note">{_text(note)}.</p>' for note in notes),
             "<noscript><p>The pictures need JavaScript. The table above has their figures.</p></noscript>"]
    for index, (name, about, data, layout) in enumerate(pictures):
        tall = " own" if "height" in layout else " tall" if len(data) > SHOWN else ""
        parts.append(f'<h2>{_text(name)}</h2>\n<p class="note">{_text(about)}</p>\n'
                     f'<div id="plot{index}" class="plot{tall}"></div>')
    parts += [f'<script type="application/json" id="figures">{_in_script(figures)}</script>',
              f"<script>{get_plotlyjs()}</script>", f"<script>{_DRAW}</script>", "</body>\n</html>\n"]
    return "\n".join(parts)


def _text(text: str) -> str:
    return html.escape(text)


def _in_script(text: str) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return text.replace("<", "\\u003c")


def _table(groups: Sequence[Group], differences: Sequence[Difference], published: Sequence[Published]) -> str:
    names, rows = cells(groups, differences, published)
    words = len(groups[0].settings) + 1

    def line(kind: str, row: Sequence[str]) -> str:
        told = (f"<{kind}{' class=word' if at < words else ''}>{_text(cell)}</{kind}>" for at, cell in enumerate(row))
        return f"<tr>{''.join(told)}</tr>"

    return "\n".join(['<div class="wide"><table>', f"<thead>{line('th', names)}</thead>", "<tbody>",
                      *(line("td", row) for row in rows), "</tbody></table></div>"])


def _pictures(groups: Sequence[Group], differences: Sequence[Difference],
              published: Sequence[Published]) -> list[Picture]:
    """Return the pictures that there is something to draw in."""
    found = []
    if groups[0].metric:
        if len({group.asked for group in groups if not math.isnan(group.asked)}) > 1:
            found.append(_over_epsilon(groups, published))
        found += [_over_rounds(groups), _over_bytes(groups)]
        if any(one.seeds for one in differences):
            found.append(_differences(differences))
    if runs := [(group, one) for group in groups for one in group.results if one.clients]:
        found.append(_over_clients(runs))
    return found


def _look(index: int) -> dict[str, Any]:
    """Return colour, dashes and symbol of the curve with this index."""
    look = style.series(index)
    return {"line": {"color": look.colour, "width": look.width, "dash": DASHES.get(look.dashes, "dash")},
            "marker": {"color": look.colour, "symbol": SYMBOLS[look.marker], "size": 5 + look.width}}


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": style.GRID, "zeroline": False, "automargin": True, "linecolor": style.GRID}
    own = {name: axis | more.pop(name, {}) for name in ("xaxis", "yaxis")}
    own["xaxis"].setdefault("title", {"text": x})
    own["yaxis"].setdefault("title", {"text": y})
    return {"font": {"family": "system-ui, sans-serif", "color": style.INK, "size": 13}, "paper_bgcolor": style.PAPER,
            "plot_bgcolor": style.PAPER, "margin": {"l": 60, "r": 20, "t": 20, "b": 50}, "hovermode": "closest",
            "legend": {"orientation": "v"}, "showlegend": True, **own, **more}


def _majority(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the layout's line at the majority rate; {} if there is none, or several."""
    found = {round(one.majority, 6) for group in groups for one in group.results if one.majority is not None}
    if len(found) != 1:
        return {}
    rate = found.pop()
    return {"shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": rate, "y1": rate,
                        "line": {"color": style.INK, "width": 1, "dash": "dot"}}],
            "annotations": [{"xref": "paper", "x": 1, "y": rate, "xanchor": "right", "yanchor": "bottom",
                             "showarrow": False, "text": f"most frequent label alone: {rate:.3f}",
                             "font": {"size": 12}}]}


def _axis_of_epsilon(epsilon: float) -> str:
    return "none" if math.isinf(epsilon) else f"{epsilon:.3g}"


def _over_epsilon(groups: Sequence[Group], published: Sequence[Published]) -> Picture:
    """Draw the figure against ε, which is on an axis of equal steps because it can be infinite."""
    metric = title(groups[0].metric or "")
    known = [group for group in groups if not math.isnan(group.asked) and group.values]
    lines: dict[str, list[Group]] = {}
    for group in known:
        rest = {name: value for name, value in group.settings.items() if name != "epsilon"}
        lines.setdefault(Group(group.method, rest, group.results).label, []).append(group)
    data = []
    for index, (label, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda group: group.asked)
        data.append({"type": "scatter", "mode": "lines+markers", "name": label, **_look(index),
                     "x": [_axis_of_epsilon(one.asked) for one in members], "y": [one.mean for one in members],
                     "error_y": {"type": "data", "array": [one.deviation for one in members], "thickness": 1.2},
                     "customdata": [len(one.values) for one in members],
                     "hovertemplate": f"ε %{{x}}: %{{y:.3f}} ± %{{error_y.array:.3f}} over %{{customdata}} seeds"
                                      f"<extra>{_text(label)}</extra>"})
        told = [(one, figure) for one in members if (figure := published_for(one, published))]
        if told:
            look = _look(index)["marker"]
            data.append({"type": "scatter", "mode": "markers", "name": f"{label} (published)",
                         "marker": look | {"symbol": f"{look['symbol']}-open", "size": 12, "line": {"width": 2}},
                         "x": [_axis_of_epsilon(one.asked) for one, _ in told],
                         "y": [figure.value for _, figure in told]})
    order = [_axis_of_epsilon(one) for one in sorted({group.asked for group in known})]
    return (f"{metric.capitalize()} against ε", "Mean over the seeds; bars are one standard deviation to each side. "
            "“none” is training without privacy.", data,
            _layout("ε of a client", metric, xaxis={"type": "category", "categoryorder": "array",
                                                    "categoryarray": list(dict.fromkeys(order))}, **_majority(groups)))


def _curve(group: Group, xs: Mapping[int, float], index: int) -> Trace:
    """Return the group's mean figure over the rounds that all its runs evaluated.

    Args:
        group: the group.
        xs: round → its place on the x axis.
        index: the group's place among the curves.
    """
    metric = group.metric or ""
    histories = [{one.round: one.figures[metric] for one in result.evaluated} for result in group.ended]
    rounds = [number for number in sorted(set.intersection(*map(set, histories))) if number in xs]
    points = [mean_and_deviation([history[number] for history in histories]) for number in rounds]
    return {"type": "scatter", "mode": "lines+markers" if len(rounds) <= style.MARKED else "lines",
            "name": group.label, **_look(index), "x": [xs[number] for number in rounds],
            "y": [mean for mean, _ in points],
            "customdata": [[number, deviation] for number, (_, deviation) in zip(rounds, points, strict=True)],
            "hovertemplate": f"round %{{customdata[0]}}: %{{y:.3f}} ± %{{customdata[1]:.3f}}"
                             f"<extra>{_text(group.label)}</extra>",
            **({} if index < SHOWN else {"visible": "legendonly"})}


def _over_rounds(groups: Sequence[Group]) -> Picture:
    metric = title(groups[0].metric or "")
    last = max(one.last_round for group in groups for one in group.results)
    data = [_curve(group, {one.round: one.round for one in group.ended[0].rounds}, index)
            for index, group in enumerate(groups) if group.ended]
    return (f"{metric.capitalize()} against rounds", "Mean over the seeds. " + _clicks(data), data,
            _layout("round", metric, xaxis={"rangemode": "tozero"} | _whole(last), **_majority(groups)))


def _whole(last: int) -> dict[str, Any]:
    """Return the layout of an axis of round numbers that has ticks at whole numbers alone."""
    return {"dtick": 1} if last <= 12 else {}


def _over_bytes(groups: Sequence[Group]) -> Picture:
    metric, data = title(groups[0].metric or ""), []
    for index, group in enumerate(groups):
        if not group.ended:
            continue
        totals: list[dict[int, float]] = []
        for result in group.ended:
            total, found = 0.0, {}
            for one in result.rounds:
                total += (one.bytes_up + one.bytes_down) / 1e6
                found[one.round] = total
            totals.append(found)
        common = set.intersection(*map(set, totals))
        data.append(_curve(group, {number: mean_and_deviation([one[number] for one in totals])[0] for number in common},
                           index))
    return (f"{metric.capitalize()} against bytes", "Megabytes that all clients have sent and received so far. "
            + _clicks(data), data, _layout("MB up and down, all clients", metric, xaxis={"rangemode": "tozero"},
                                           **_majority(groups)))


def _clicks(data: Sequence[Trace]) -> str:
    return f"{len(data) - SHOWN} curves are hidden: click on their names to show them." if len(data) > SHOWN else ""


def _differences(differences: Sequence[Difference]) -> Picture:
    """Draw the differences from the baseline, one line each, with their intervals."""
    metric = title(differences[0].group.metric or "")
    found = [one for one in differences if one.seeds]
    ends = [one.interval or (one.mean, one.mean) for one in found]
    data: list[Trace] = [{
        "type": "scatter", "mode": "markers", "x": [one.mean for one in found],
        "y": [one.group.label for one in found], "showlegend": False, "marker": {
            "size": 9, "color": [style.BLUE if one.is_clear else style.FAINT for one in found],
            "symbol": ["circle" if one.is_clear else "circle-open" for one in found]},
        "error_x": {"type": "data", "symmetric": False, "thickness": 1.5, "color": style.INK,
                    "array": [high - one.mean for one, (_, high) in zip(found, ends, strict=True)],
                    "arrayminus": [one.mean - low for one, (low, _) in zip(found, ends, strict=True)]},
        "customdata": [len(one.seeds) for one in found],
        "hovertemplate": "%{x:+.3f} over %{customdata} seeds<extra>%{y}</extra>"}]
    zero = {"type": "line", "layer": "below", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0,
            "line": {"color": style.INK, "width": 1}}
    return (f"Paired differences in {metric}", compared(found)[0].upper() + compared(found)[1:] + ". Filled: the "
            "interval excludes 0; no correction is made for their number.", data,
            _layout(f"difference in {metric}", "", shapes=[zero], height=110 + 34 * len(found),
                    yaxis={"range": [len(found) - 0.4, -0.6], "type": "category", "title": {}}))


def _over_clients(runs: Sequence[tuple[Group, Result]]) -> Picture:
    """Draw each client's training loss, one run at a time."""
    data: list[Trace] = []
    buttons, owners = [], []
    for at, (_, result) in enumerate(runs[:RUNS]):
        for index, (name, curve) in enumerate(result.clients.items()):
            data.append({"type": "scatter", "mode": "lines+markers", "name": name, **_look(index),
                         "x": [number for number, _ in curve], "y": [loss for _, loss in curve], "visible": at == 0})
            owners.append(at)
    for at, (group, result) in enumerate(runs[:RUNS]):
        buttons.append({"label": f"{group.label}, seed {result.seed}", "method": "restyle",
                        "args": [{"visible": [owner == at for owner in owners]}]})
    last = max(number for _, result in runs for curve in result.clients.values() for number, _ in curve)
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.05, "yanchor": "bottom"}
    more = f" The first {RUNS} of {len(runs)} runs." if len(runs) > RUNS else ""
    return ("Training loss of each client", "Choose a run above the picture. Only runs without privacy have these "
            f"curves: private clients tell no loss.{more}", data,
            _layout("round", "training loss", xaxis=_whole(last), updatemenus=[menu] if len(buttons) > 1 else [],
                    margin={"l": 60, "r": 20, "t": 60, "b": 50}))
