"""Comparison of two result files, value by value: `python -m benchmarks compare`.

A value is worse if its median is worse and the gap between the quartile ranges of the two measurements exceeds the
value's tolerance; better is decided likewise. A value that a figure had and no longer has, with the same settings,
counts as worse too: otherwise something that can no longer be measured would pass. A figure that was not measured again
at all is only named.

Seconds and bytes depend on the machine, so they are compared only between results of one machine with the same
settings. They have a wider tolerance of their own, since no second measurement taken in turn cancels the machine's
drift.
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
"""Version of the format of result files."""

UNIT_TOLERANCE = 0.25
"""Largest gap between quartile ranges of seconds or bytes that counts as no change, as a share of the old median."""


@dataclass(frozen=True)
class Change:
    """One value and how it changed between the two files.

    Attributes:
        figure: sub-command of the figure.
        case: name of the row.
        name: name of the value in its row.
        old: the value in the old file; None if only the new one has it.
        new: the value in the new file; None if only the old one has it.
        verdict: "worse", "better" or "same"; "new" or "gone" if only one file has the value.
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
        ValueError: the file cannot be read, or is not a result file of this format.
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
    """Compare all values of two results that have a better direction.

    Seconds and bytes are left out unless both results are of the same machine and settings.

    Returns:
        One change for each value, in the order of the new result; values that are gone come last.
    """
    units = same_setup(old, new)
    before, after = dict(_values(old, units)), dict(_values(new, units))
    return [Change(*key, before.get(key), after.get(key), _verdict(before.get(key), after.get(key)))
            for key in [*after, *(key for key in before if key not in after)]]


def same_setup(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether both results were measured on the same kind of machine, with the same settings."""
    machines = [{name: value for name, value in result["machine"].items() if name != "load"} for result in (old, new)]
    return machines[0] == machines[1] and old["settings"] == new["settings"]


def joined(old: Mapping[str, Any], new: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Continue an old result: return the new one with the old one's figures and starting time.

    Args:
        old: the result that `file` holds.
        new: a result without figures yet.
        file: named in the error message.

    Raises:
        ValueError: the results are of different machines, settings or versions.
    """
    if not same_setup(old, new) or old["versions"] != new["versions"]:
        raise ValueError(f"--out {file} is of another machine, of other settings or of other versions; one file holds "
                         "figures of one set-up only. Name another file")
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
    """Return a table of the changes, without the values that stayed the same."""
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
