"""Sweeps: the settings that --sweep and --tune ask for, each parsed as the option itself would be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NoReturn

from fedlora.config import SimulationConfig, build_parser, flag, options_of
from fedlora.config.commands import not_an_option

ELSEWHERE: Mapping[str, str] = {
    "strategy": "several strategies go into --strategy, separated by commas", "seeds": "several seeds go into --seeds",
    "privacy": "sweep epsilon, whose value inf turns privacy off", **dict.fromkeys(
        ("config", "data", "eval-data", "out", "dry-run", "resume", "reference", "sweep", "tune", "tune-budget",
         "track", "task", "allow-download", "column", "delimiter", "encoding", "sheet", "label-map", "labels",
         "skip-incomplete", "workers", "engine", "ray-address", "threads"),
        "it is the same for all runs of one command")}
"""Options that cannot be swept, and why."""


@dataclass(frozen=True)
class Setting:
    """One combination of values of the swept options.

    Attributes:
        values: option's name → its value as it was given, in the order of --sweep; empty without a sweep.
        options: the options of fedlora-simulate with these values, and without --sweep and what else is about several
            runs.
    """

    values: Mapping[str, str]
    options: SimulationConfig

    def __str__(self) -> str:
        return told(self.values)

    @property
    def before(self) -> str:
        """The setting for the beginning of a message: "epsilon=1, rank=2: "; "" without a sweep."""
        return f"{self}: " if self.values else ""


def told(values: Mapping[str, str]) -> str:
    """Return a setting in a line: "epsilon=1, rank=2"."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def settings(options: SimulationConfig) -> list[Setting]:
    """Return every combination of the values of --sweep, the last option's values changing fastest.

    Raises:
        ValueError: a name is no option that can be swept, or a value is not one that the option takes.
    """
    plain = replace(options, sweep={}, tune={}, tune_budget=None, resume=False, reference=None)
    return [Setting(values, with_values(plain, parsed)) for values, parsed in combinations(options.sweep, "--sweep")]


def combinations(swept: Mapping[str, Sequence[str]], given_by: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield every combination of values: as texts by the options' names, and parsed by the fields' names.

    Args:
        swept: option's name → texts of its values.
        given_by: "--sweep" or "--tune", for error messages.

    Raises:
        ValueError: a name is no option that can be swept, or a value is not one that the option takes.
    """
    parsed = {name: [_parsed(name, text, given_by) for text in texts] for name, texts in swept.items()}
    for name, found in parsed.items():
        if twice := [at for at in range(len(found)) if found[at] in found[:at]]:
            raise ValueError(f"{given_by}: {name} has the value {swept[name][twice[0]]} twice; name each value once")
    for texts, values in zip(product(*swept.values()), product(*parsed.values()), strict=True):
        yield dict(zip(swept, texts, strict=True)), {
            name.replace("-", "_"): value for name, value in zip(swept, values, strict=True)}


def with_values(options: SimulationConfig, values: Mapping[str, Any]) -> SimulationConfig:
    """Return the options with these values. ε = inf turns privacy off too.

    Args:
        options: the options of fedlora-simulate.
        values: field's name → value.
    """
    off = {"privacy": "off"} if values.get("epsilon") == math.inf else {}
    return replace(options, **{**values, **off})


def _parsed(name: str, text: str, given_by: str) -> Any:
    """Return a value as the option's own parser reads it."""
    known = {flag(field): field for field in options_of(SimulationConfig)}
    if name in ELSEWHERE:
        raise ValueError(f"{given_by}: {name} cannot be varied: {ELSEWHERE[name]}")
    if name not in known:
        raise ValueError(f"{given_by}: " + not_an_option(name, "fedlora-simulate", known.keys() - ELSEWHERE.keys(),
                                                         name, "{}".format))
    parser = build_parser(SimulationConfig)

    def complain(message: str) -> NoReturn:
        raise ValueError(f"{given_by}: {message.removeprefix('argument ')}")

    parser.error = complain  # type: ignore[method-assign]
    if options_of(SimulationConfig)[known[name]].parse is None:
        if text not in ("true", "false"):
            complain(f"{name} is true or false, not {text!r}")
        return text == "true"
    return getattr(parser.parse_args([f"--{name}={text}"]), known[name])
