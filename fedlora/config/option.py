"""One option is one field of a config: its type, its default, and in its metadata how it is given and explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.config import values
from fedlora.config.values import Choices

RUN, MODEL, PRIVACY, NETWORK, TUNING = GROUPS = ("run", "model", "privacy", "network", "tuning")
"""Of --help, in its order."""

PRESET = "preset"
"""Stands in where a value of the strategy's preset is not given."""


@dataclass(frozen=True)
class Option:
    """How a field is given.

    Attributes:
        help: one line.
        group: one of `GROUPS`.
        parse: from text to value; None for what is true or false.
        choices: the words that it can be, if they are few.
        metavar: stands for the value in --help; None for the name, or the choices.
        unset: what stands in where it is not given, in words, by command where commands differ; `PRESET` for a value of
            the preset; None where the default is all there is to say.
        plan: the field of `fedlora.plan.RunPlan` that follows from it; "" for none.
        keys: the package whose keys its help lists; "" for none.
        place: in its group of --help: 1 for what nearly every run gives, 9 for what hardly one does.
    """

    help: str
    group: str
    parse: Callable[[str], Any] | None
    choices: Choices | None
    metavar: str | None
    unset: str | Mapping[str, str] | None
    plan: str
    keys: str
    place: int


def option(default: Any, help: str, group: str, parse: Callable[[str], Any] | None = values.text, *,
           choices: Choices | None = None, metavar: str | None = None, unset: str | Mapping[str, str] | None = None,
           plan: str = "", keys: str = "", place: int = 5) -> Any:
    """A field of a config, with the metadata that `Option` explains."""
    metadata = {"option": Option(help, group, parse, choices, metavar, unset, plan, keys, place)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(config: type) -> dict[str, Option]:
    """Field → option, in the order of the fields: those that several commands have come first."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(config)}


def flag(name: str) -> str:
    """A field's name on the command line and in the file."""
    return name.replace("_", "-")
