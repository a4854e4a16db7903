"""Comparison of two result files, value by value: `python -m benchmarks compare`.

A value got worse if its median did, and the quartiles of the two measurements are further apart than its tolerance;
likewise better. One that a figure had and, with the same settings, no longer has counts as worse: else whatever cannot
be measured any more would pass. A figure that was not measured again at all is only named. Seconds and bytes belong to
the machine: they are compared only between results of one machine with the same settings, and with a tolerance of their
own, as nothing that was measured in turn cancels what it did meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import RATIO, Value, value_from_json

FORMAT = 1
"""Of result files."""

UNIT_TOLERANCE = 0.25
"""Share of the old median by which the quartiles of seconds and bytes may be apart."""


@dataclass(frozen=True)
class Change:
    """One value in both files.

    Attributes:
        verdict: "worse", "better" or "same"; "new" or "gone" if one file alone has it.
    """

    figure: str
    case: str
    name: str
    old: Value | None
    new: Value | None
    verdict: str


def read_result(file: Path) -> Mapping[str, Any]:
    """Read a result file.

    Raises:
        ValueError: it cannot be read or is something else.
    """
    try:
        result = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a result file of the benchmarks: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{file} is not a result file of these benchmarks (format {FORMAT}); write one "
                         "with python -m benchmarks all --out FILE.json")
    return result


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every ratio of either result, in the order of the new one, then what is gone; of one set-up seconds and bytes
    too, where more or fewer is better.
    """
    units = same_setup(old, new)
    before, after = dict(_values(old, units)), dict(_values(new, units))
    return [Change(*key, before.get(key), after.get(key), _verdict(before.get(key), after.get(key)))
            for key in [*after, *(key for key in before if key not in after)]]


def same_setup(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both were measured on machines alike, with the same settings."""
    machines = [{name: of for name, of in result["machine"].items() if name != "load"} for result in (old, new)]
    return machines[0] == machines[1] and old["settings"] == new["settings"]


def joined(old: Mapping[str, Any], new: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A result that begins with the figures of an old one, and goes on.

    Raises:
        ValueError: they are of different machines, settings or versions. `file` is where the old one lies.
    """
    if not same_setup(old, new) or old["versions"] != new["versions"]:
        raise ValueError(f"--out {file} was measured on another machine, with other settings or versions; the figures "
                         "of one file belong together. Name another file")
    return {**new, "began": old["began"], "figures": dict(old["figures"])}


def _values(result: Mapping[str, Any], units: bool) -> Iterator[tuple[tuple[str, str, str], Value]]:
    for figure, measured in result["figures"].items():
        for row in measured.get("rows", ()):
            for name, fields in row["values"].items():
                value = value_from_json(fields)
                if value.better and (units or value.unit == RATIO):
                    yield (figure, row["case"], name), value


def _verdict(old: Value | None, new: Value | None) -> str:
    if old is None or new is None:
        return "new" if old is None else "gone"
    tolerance = max(old.tolerance, new.tolerance, 0.0 if new.unit == RATIO else UNIT_TOLERANCE) * abs(old.median)
    rose, fell = new.low - old.high > tolerance, old.low - new.high > tolerance
    if not (rose or fell):
        return "same"
    return "better" if rose == (new.better == "higher") else "worse"


def table(changes: list[Change]) -> Table:
    """Changes one by one; those that stayed the same are not shown."""
    shown = Table(title="value by value, medians (quartiles)", box=None, title_justify="left")
    for heading in ("figure", "case", "value", "old", "new", ""):
        shown.add_column(heading)
    for change in changes:
        if change.verdict != "same":
            style = {"worse": "red", "better": "green"}.get(change.verdict)
            shown.add_row(change.figure, change.case, change.name, _text(change.old), _text(change.new),
                          change.verdict, style=style)
    return shown


def _text(value: Value | None) -> str:
    if value is None:
        return ""
    unit = "" if value.unit == RATIO else f" {value.unit}"
    return f"{value.median:.4g}{unit} ({value.low:.4g}–{value.high:.4g})"
