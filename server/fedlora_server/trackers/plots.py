"""The picture curves.png of the rounds, drawn when they have ended: evaluation, update norms, traffic and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from typing_extensions import override

from fedlora import figures, style
from fedlora.plan import RunPlan
from fedlora.quantities import quantity
from fedlora_server.curves import panels_of, points_of, story
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Tracker, Watched

ENDINGS = {"finished": "", "stopped": ", stopped early", "wait-timeout": ", ended for lack of clients",
           "diverged": ", ended because training diverged"}
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))

Panel = Callable[[Axes, Sequence[RoundRecord]], None]


class Plots(Tracker):
    """The tracker that draws the picture when the rounds have ended, also if the run ended early."""

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._records: list[RoundRecord] = []

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._plan, self._records = plan, list(before)

    @override
    def finished(self, record: RoundRecord) -> None:
        self._records.append(record)

    @override
    def ended(self, reason: str) -> None:
        plan, last = self._plan, self._records[-1].round if self._records else 0
        draw(self.run.out / "curves.png", self._records,
             f"{plan.strategy}, {'private' if plan.private else 'not private'}, {plan.model.title}: "
             f"{last} of {plan.rounds} rounds{ENDINGS[reason]}")


def draw(path: Path, records: Sequence[RoundRecord], title: str) -> Path:
    """Write a PNG with one panel per quantity over the rounds, and return its path.

    With evaluations, the first panels show the task's figures and the loss. Update norm, bytes and time are always
    shown. A run without a finished round gets empty panels.

    Args:
        path: the file to write.
        records: the run's records.
        title: stands above the panels.
    """
    evaluated = panels_of(records)
    panels: list[Panel] = [_evaluation(names) for names in evaluated] + [_update_norm, _bytes, _seconds]
    columns = 3 if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    last = records[-1].round if records else 0
    for place, panel in zip(_places(figure, rows, columns, len(panels)), panels, strict=True):
        panel(place, records)
        _finish(place, 0 if evaluated else 0.8, last)
    return style.save(figure, path, title)


def _places(figure: Figure, rows: int, columns: int, count: int) -> list[Axes]:
    """Return `count` axes in reading order. If the first row is not full, its panels are wider."""
    first = count - (rows - 1) * columns
    grid = figure.add_gridspec(rows, columns * first)
    places = [figure.add_subplot(grid[0, i * columns:(i + 1) * columns]) for i in range(first)]
    return places + [figure.add_subplot(grid[row, i * first:(i + 1) * first])
                     for row in range(1, rows) for i in range(columns)]


def _evaluation(names: Sequence[str]) -> Panel:
    def panel(axes: Axes, records: Sequence[RoundRecord]) -> None:
        for index, name in enumerate(names):
            points = points_of(name, records)
            rounds, values = zip(*points, strict=True)
            told = f"{figures.title(name)}: {story(points, records[-1].round)}"
            look = style.series(index, style.LOSS if name == "loss" else "")
            axes.plot(rounds, values, label=told, **look.line(len(rounds)))
            _add_interval(axes, name, rounds, records, look.colour)
        axes.margins(y=0.1)
        if len(names) == 1:
            axes.set_title(told)
        else:
            axes.set_title("further figures")
            axes.margins(y=0.4)
            style.explain(axes, "upper left")

    return panel


def _add_interval(axes: Axes, name: str, rounds: Sequence[int], records: Sequence[RoundRecord],
                  colour: str) -> None:
    """Shade a figure's interval, and draw the majority rate beside the accuracy, where all rounds have them."""
    low, high, majority = ([value for _, value in points_of(f"{name}/{end}", records)]
                           for end in ("low", "high", "majority"))
    if len(low) == len(rounds):
        axes.fill_between(rounds, low, high, color=colour, alpha=0.15, lw=0)
    if majority:
        axes.axhline(majority[-1], color=style.INK, lw=1, ls=":")
        axes.annotate(f"most frequent label alone: {majority[-1]:.3f}", (1, majority[-1]),
                      xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=style.INK)


def _update_norm(axes: Axes, records: Sequence[RoundRecord]) -> None:
    points = [(r.round, r.update_norm) for r in records if r.update_norm is not None]
    look = style.series(0, style.MOVED)
    axes.plot([x for x, _ in points], [y for _, y in points], **look.line(len(points)))
    axes.set_ylim(0, 1.12 * max((norm for _, norm in points), default=1.0) or 1.0)
    axes.set_title("update norm (L2, trained tensors)")


def _bytes(axes: Axes, records: Sequence[RoundRecord]) -> None:
    trained = [r for r in records if r.round > 0]
    largest = max((r.bytes_up + r.bytes_down for r in trained), default=0)
    scale, unit = next(((s, u) for s, u in UNITS if largest >= s), UNITS[-1])
    rounds, up, down = zip(*((r.round, r.bytes_up / scale, r.bytes_down / scale) for r in trained), strict=True) \
        if trained else ((), (), ())
    axes.bar(rounds, up, color=style.UP, width=0.7, label=f"up, {quantity(sum(up) * scale)} in all")
    axes.bar(rounds, down, bottom=up, color=style.DOWN, width=0.7, label=f"down, {quantity(sum(down) * scale)} in all")
    axes.set_title(f"traffic per round ({unit}, all clients)")
    axes.margins(y=0.35)
    style.explain(axes, "upper right")


def _seconds(axes: Axes, records: Sequence[RoundRecord]) -> None:
    trained = [r for r in records if r.round > 0]
    axes.bar([r.round for r in trained], [r.seconds for r in trained], color=style.TIME, width=0.7)
    axes.set_title(f"seconds per round ({sum(r.seconds for r in trained):.0f} s in all)")


def _finish(axes: Axes, first: float, last: int) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(first - 0.4, max(last, 1) + 0.6)
    if axes.get_ylim()[0] < 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style.finish(axes)


TRACKER = Plots
