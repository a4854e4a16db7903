"""From a command line to a config: the parser, and --help, derive from the config's fields.

A value comes from, in falling order: the command line, the file's table named after the command ([server], [client],
[simulate]), the file's top level, the run that is resumed, the preset of (strategy, privacy), the default of the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fedlora import registry
from fedlora.config import values
from fedlora.config.option import GROUPS, Option, flag
from fedlora.config.shared import Config
from fedlora.config.toml import arguments, file_arguments

C = TypeVar("C", bound=Config)


class _Parser(argparse.ArgumentParser):
    """Its errors are one line: the usage would be three more."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Merged(argparse.Action):
    """Given twice, mappings and pairs of names and numbers add up."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        both = dict(getattr(namespace, self.dest, {})) | dict(values)
        setattr(namespace, self.dest, tuple(sorted(both.items())) if isinstance(values, tuple) else both)


def build_parser(config: type[Config], *, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command. Its defaults are all absent, so that `read_config` can tell what was given."""
    parser = _Parser(prog=re.split(r" [\[-]", config.forms[0])[0], usage="\n       ".join(config.forms),
                     description=config.__doc__, epilog=epilog, add_help=False, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28))
    fields = sorted(dataclasses.fields(config), key=lambda field: field.metadata["option"].place)
    for group in GROUPS:
        part = parser.add_argument_group(group)
        for field in fields:
            if field.metadata["option"].group == group:
                _add(part, field, config.command)
        if group == GROUPS[0]:
            part.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _add(part: argparse._ArgumentGroup, field: dataclasses.Field, command: str) -> None:
    """The field's flag, its help, and what stands in where it is not given."""
    option: Option = field.metadata["option"]
    unset = option.unset[command] if isinstance(option.unset, Mapping) else option.unset
    if unset is None and option.parse is not None and field.default not in (None, dataclasses.MISSING):
        unset = shown(field.default)
    name = f"--{flag(field.name)}"
    known = f" ({', '.join(registry.keys(option.keys))})" if option.keys else ""
    text = (option.help + known + (f" [{unset}]" if unset else "")).replace("%", "%%")
    if option.parse is None:
        part.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = None if option.choices is None else values.chosen(option.choices)
    metavar = option.metavar or (None if choices else _METAVARS[str(field.type).partition(" ")[0]])
    part.add_argument(name, action=_Merged if option.parse in values.ADD_UP else "store", type=option.parse,
                      choices=choices, metavar=metavar, help=text)


_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}
"""What stands for a value of a type in --help, where nothing better does."""


def shown(value: Any) -> str:
    """A value as it is given."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(
        value, float) else str(value)


def read_config(config: type[C], argv: Sequence[str] | None, *, epilog: str | None = None,
                begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> C:
    """Parse `argv` over the --config file over the defaults; a bad value ends the process with code 2.

    Args:
        argv: None for the process's own.
        epilog: the last lines of --help.
        begun_with: the options of the run in the folder that --resume names, which then stand in for the defaults; it
            raises ValueError where there is none.
    """
    return _read(build_parser(config, epilog=epilog), config, argv, begun_with)


def config_from(table: Mapping[str, str | int | float | bool], config: type[C], source: str) -> C:
    """A config from keys and values, as Flower's run and node configurations give them; "" is not given.

    Args:
        source: named in errors.

    Raises:
        ValueError: a key is not an option of the command, or a value is not one of its values.
    """
    def complain(message: str) -> NoReturn:
        raise ValueError(f"{source}: {message.removeprefix('argument ')}")

    parser = build_parser(config)
    parser.error = complain  # type: ignore[method-assign]
    given = {key: value for key, value in table.items() if value != ""}
    return _read(parser, config, arguments(given, config, source))


def _read(parser: argparse.ArgumentParser, config: type[C], argv: Sequence[str] | None,
          begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> C:
    given = parser.parse_args(argv)
    found: dict[str, Any] = {}
    try:
        if begun_with is not None and "resume" in given:
            begun = arguments(begun_with(given.resume), config, f"--resume {given.resume}")
            found |= vars(parser.parse_args(begun))
        if "config" in given:
            found |= vars(parser.parse_args(file_arguments(given.config, config)))
    except ValueError as error:
        parser.error(str(error))
    return config(**found | vars(given))
