"""Options as fields of a config: a field has the type and the default, its metadata the parser and the help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.config import values
from fedlora.config.values import Choices

RUN, MODEL, PRIVACY, NETWORK, TUNING = GROUPS = ("run", "model", "privacy", "network", "tuning")
"""The groups of --help, in their order."""

PRESET = "preset"
"""Shown in --help as the default of options whose default is the value of the strategy's preset."""


@dataclass(frozen=True)
class Option:
    """The way an option is given on the command line, and its explanation in --help.

    Attributes:
        help: the help text, one sentence without its full stop.
        group: one of `GROUPS`.
        parse: turns the text of a value into the value; None for a flag.
        choices: the words that the value can be, if they are few.
        metavar: what stands for the value in --help; None for the type's usual one, or the choices.
        unset: what applies if the option is not given, in words; a mapping from command to words if commands differ;
            `PRESET` for the preset's value; None to show the default itself.
        plan: the field of `fedlora.plan.RunPlan` that follows from the option; "" for none.
        keys: a package whose keys the help text lists; "" for none.
        place: sorts the options of a group in --help, from 1 for those that nearly every run gives to 9 for the rarest.
        example: a value, as TOML writes it, for the file that `init` writes if there is no default; "" for one that
            follows from the type.
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
    example: str


def option(default: Any, help: str, group: str, parse: Callable[[str], Any] | None = values.text, *,
           choices: Choices | None = None, metavar: str | None = None, unset: str | Mapping[str, str] | None = None,
           plan: str = "", keys: str = "", place: int = 5, example: str = "") -> Any:
    """Return a dataclass field for a config, with an `Option` as its metadata.

    Args:
        default: the field's default. A dict is copied for each config.
        help: the help text, one sentence without its full stop.
        group: one of `GROUPS`.
        parse: turns the text of a value into the value; None for a flag.
        choices: the words that the value can be.
        metavar: what stands for the value in --help.
        unset: what applies if the option is not given, in words.
        plan: the field of the plan that follows from the option.
        keys: a package whose keys the help text lists.
        place: sorts the options of a group in --help.
        example: a value, as TOML writes it, to show if there is no default.
    """
    metadata = {"option": Option(help, group, parse, choices, metavar, unset, plan, keys, place, example)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(config: type) -> dict[str, Option]:
    """Return the options of a config by field name, in the order of the fields."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(config)}


def flag(name: str) -> str:
    """Return a field's name on the command line and in the TOML file, with hyphens."""
    return name.replace("_", "-")
