"""Parts of SVG pictures: ticks, numbers, lines and text. They need no script, font or image from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from fedlora.style import INK


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Return about so many round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`.

    Args:
        low: the least number that may be returned.
        high: the greatest one, above `low`.
        about: how many are wanted.
        whole: whether they must be whole numbers.
    """
    least = (high - low) / about
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step * (1 - 1e-9)), math.floor(high / step * (1 + 1e-9))
    return [index * step for index in range(first, last + 1)]


def number(value: float, among: Sequence[float]) -> str:
    """Write a tick with as many decimals as the distance between the ticks needs."""
    decimals = max(0, -math.floor(math.log10(among[1] - among[0]) + 1e-9)) if len(among) > 1 else 0
    return f"{value:.{decimals}f}" if decimals <= 4 else f"{value:g}"


def printable(text: str) -> str:
    """Return the text with U+FFFD for each character that prints nothing, such as control characters."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def written(text: str) -> str:
    """Escape text for XML and HTML, which have no place for control characters at all."""
    return escape(printable(text))


def line(points: Iterable[tuple[float, float]], colour: str, *, width: float = 1.0, dash: str = "") -> str:
    """Return a line through points, in pixels from the upper left corner.

    Args:
        points: (x, y) of its corners.
        colour: its colour.
        width: its width in pixels.
        dash: lengths of dashes and gaps, as SVG writes them; "" for a whole line.
    """
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle", turned: bool = False,
         colour: str = INK) -> str:
    """Return a text, which is escaped, so that it may hold any characters.

    Args:
        x: where it is anchored, in pixels from the left.
        y: its baseline, in pixels from the top.
        words: the text.
        size: height of the font in pixels.
        anchor: "start", "middle" or "end".
        turned: whether it is written from the bottom to the top.
        colour: its colour.
    """
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{turn}>'
            f"{written(words)}</text>")
