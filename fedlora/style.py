"""The one look of all pictures: colours, line styles that stay apart, and the finish of a picture's axes.

Colours are hexadecimal strings, which matplotlib, plotly, SVG and CSS all take. Importing this file imports none of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER, GRID, FAINT = "#333333", "#ffffff", "#e2e5e8", "#8b929a"
"""Colours of text and axes, of the background, of grid lines, and of what is only planned."""

BLUE, VERMILION, GREEN, ROSE, BROWN, INDIGO = COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc6ea6", "#6b3410", "#2b1a6b")
"""Colours of curves, told apart by the colour-blind too. Each has a contrast of at least 3 to `PAPER`."""

LEARNED, LOSS, MOVED, UP, DOWN, TIME, LIMIT = BLUE, VERMILION, GREEN, BLUE, "#8ec1e0", FAINT, VERMILION
"""Colours of what the model learned, its loss, update norms, bytes up and down, time, and of a bound."""

ON_DARK = {INK: "#e4e6e9", PAPER: "#16191d", GRID: "#343a41", FAINT: "#959ca5", BLUE: "#a8d8ff", VERMILION: "#f2661b",
           GREEN: "#3fae84", ROSE: "#cf5fb0", BROWN: "#f0dcae", INDIGO: "#8668ff", DOWN: "#3f7299"}
"""Colour → the one that takes its place where the background is dark."""

MARKED = 40
"""Most points of a curve that get markers."""


@dataclass(frozen=True)
class Series:
    """The look of one of several curves or groups in a picture.

    The first curve is drawn widest and whole. Later ones are narrower and dashed, and are drawn over the earlier ones,
    so that curves that coincide all stay visible. None is told from another by its colour alone.

    Attributes:
        colour: its colour.
        width: width of its line, in points.
        dashes: lengths of its dashes and gaps, in points; () for a whole line.
        marker: the marker on its points, as matplotlib names it.
    """

    colour: str
    width: float
    dashes: tuple[float, ...]
    marker: str

    def line(self, points: int = 1) -> dict[str, Any]:
        """Return the arguments that draw the curve with `Axes.plot`.

        Args:
            points: number of its points. Up to `MARKED` of them get markers; more would hide the line.
        """
        marked = {"marker": self.marker, "ms": self.width + 2.2, "mew": 0} if points <= MARKED else {}
        pattern = (0, tuple(length / self.width for length in self.dashes)) if self.dashes else "-"
        return {"color": self.colour, "lw": self.width, "ls": pattern, **marked}


LINES = ((3.0, ()), (2.4, (7, 4)), (2.0, (2, 2.5)), (1.8, (9, 3, 2, 3)), (1.6, (4, 2)), (1.4, (12, 5)))
MARKERS = "os^DvP"


def series(index: int, colour: str = "") -> Series:
    """Return the look of the curve with this index, from 0. After six curves, another order of line styles follows.

    Args:
        index: the curve's place among those of the picture.
        colour: its colour; "" for the next of `COLOURS`.
    """
    turn, place = divmod(index, len(COLOURS))
    width, dashes = LINES[(place + turn) % len(LINES)]
    return Series(colour or COLOURS[place], width, dashes, MARKERS[(place + turn) % len(MARKERS)])


def finish(axes: Axes, *, grid: Literal["x", "y", "both"] = "y", title: str | None = None) -> None:
    """Give axes the look of all pictures: title at the left, faint grid, no frame.

    Args:
        axes: the axes, after everything was drawn.
        grid: the axis with grid lines.
        title: their title; None keeps the title that they have.
    """
    title = axes.get_title() if title is None else title
    axes.set_title("")
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)
    axes.grid(axis=grid, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)


def explain(axes: Axes, place: Literal["best", "upper left", "upper right", "lower right"] = "best") -> None:
    """Add the legend, with samples long enough to show the dashes.

    Args:
        axes: the axes, whose curves have labels.
        place: where it stands; "best" is where it covers least.
    """
    axes.legend(frameon=False, fontsize=8, loc=place, handlelength=3.2, labelcolor=INK)


def head(figure: Figure, title: str) -> None:
    """Set a picture's title, above all panels, at the left."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)


def save(figure: Figure, path: Path, title: str = "") -> Path:
    """Write the picture, and return its path.

    Args:
        figure: the picture.
        path: the file to write, in the format that its suffix names.
        title: stands above the panels; "" for none.
    """
    if title:
        head(figure, title)
    figure.savefig(path, dpi=150, facecolor=PAPER)
    return path
