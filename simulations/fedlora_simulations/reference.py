"""Published figures that are shown beside those of the runs, read from a TOML file.

    source = "the paper, its table"

    [[figure]]
    method = "fedsvd"
    settings = {epsilon = 6}
    value = 0.881
    deviation = 0.004

A figure belongs to each group of its method that has its settings. Settings that it does not name may have any value.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .pairing import Group

FIELDS = ("method", "settings", "value", "deviation", "source")


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        method: the method, as --strategy names it.
        settings: option → its value.
        value: the figure.
        deviation: its standard deviation over seeds; None if it is not published.
        source: where it is published.
    """

    method: str
    settings: Mapping[str, str]
    value: float
    deviation: float | None
    source: str

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")

    def belongs_to(self, group: Group) -> bool:
        """Return whether the figure is of the group's method, and of its setting as far as both name it."""
        return self.method == group.method and all(
            _same(value, group.settings[name]) for name, value in self.settings.items() if name in group.settings)


def read_published(path: Path) -> list[Published]:
    """Read the published figures of a file.

    Raises:
        ValueError: the file cannot be read, is not TOML, or lacks what a figure needs.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--reference {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--reference {path} is not TOML: {error}") from None
    figures, source = table.get("figure"), table.get("source")
    if not isinstance(figures, list) or not figures:
        raise ValueError(f"--reference {path} has no [[figure]]; give each a method, a value and a source")
    found = []
    for number, figure in enumerate(figures, start=1):
        where = f"--reference {path}, figure {number}"
        if unknown := [name for name in figure if name not in FIELDS]:
            raise ValueError(f"{where}: {unknown[0]} is not known; a figure has {', '.join(FIELDS)}")
        value, deviation = figure.get("value"), figure.get("deviation")
        settings, named = figure.get("settings", {}), figure.get("source", source)
        if not isinstance(figure.get("method"), str) or not _is_number(value) or not isinstance(settings, dict):
            raise ValueError(f"{where} needs a method (text) and a value (number), and its settings are a table")
        if deviation is not None and not _is_number(deviation):
            raise ValueError(f"{where}: deviation is {deviation!r}; it must be a number")
        if not isinstance(named, str):
            raise ValueError(f"{where} has no source; say where the figure is published, there or at the top")
        found.append(Published(figure["method"], {name: _text(one) for name, one in settings.items()}, float(value),
                               None if deviation is None else float(deviation), named))
    return found


def published_for(group: Group, published: Sequence[Published]) -> Published | None:
    """Return the published figure that belongs to the group; None if there is none."""
    return next((figure for figure in published if figure.belongs_to(group)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other
