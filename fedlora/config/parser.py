"""The command-line parser of each command, made from the fields of its config.

If an option is given in several places, the first of these wins: the command line; the TOML file's table named after
the command ([server], [client], [simulate]); the file's top level; the run that is resumed; the preset of the strategy
and privacy setting; the field's default.
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
from fedlora.config.arguments import Parser
from fedlora.config.completion import add_completion
from fedlora.config.option import GROUPS, Option, flag
from fedlora.config.shared import Config
from fedlora.config.subcommands import Subcommands
from fedlora.config.toml import arguments, file_arguments
from fedlora.config.values import settings

C = TypeVar("C", bound=Config)


class _Merged(argparse.Action):
    """The action of options that can be given several times: their mappings, or (name, number) pairs, are merged."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        before = dict(getattr(namespace, self.dest, {}))
        if self.type is settings and (twice := before.keys() & dict(values).keys()):
            parser.error(f"argument {option_string}: {twice.pop()} is given twice; give all its values at once, "
                         "separated by commas")
        both = before | dict(values)
        setattr(namespace, self.dest, tuple(sorted(both.items())) if isinstance(values, tuple) else both)


def build_parser(config: type[Config], *, epilog: str | None = None, subcommands: Subcommands | None = None) -> Parser:
    """Return the parser of a command. It sets no defaults, so that `read_config` can tell which options were given.

    Args:
        config: the command's config.
        epilog: the last lines of --help.
        subcommands: the command's sub-commands; None for a parser of a sub-command.
    """
    parser = Parser(prog=re.split(r" [\[A-Z-]", config.forms[0])[0], usage="\n       ".join(config.forms),
                    description=config.__doc__, epilog=epilog, add_help=False, argument_default=argparse.SUPPRESS,
                    subcommands=subcommands or ())
    fields = sorted(dataclasses.fields(config), key=lambda field: field.metadata["option"].place)
    for group in GROUPS:
        part = parser.add_argument_group(group)
        for field in fields:
            if field.metadata["option"].group == group:
                _add(part, field, config)
        if group == GROUPS[0]:
            parser.add_help_to(part)
            if subcommands is not None:
                add_completion(part, config, subcommands)
    return parser


def _add(part: argparse._ArgumentGroup, field: dataclasses.Field[Any], config: type[Config]) -> None:
    """Add a field's option to the parser, with its help text and, in brackets, what applies if it is not given."""
    option: Option = field.metadata["option"]
    unset = option.unset[config.command] if isinstance(option.unset, Mapping) else option.unset
    if unset is None and option.parse is not None and field.default not in (None, dataclasses.MISSING):
        unset = shown(field.default)
    name = f"--{flag(field.name)}"
    known = f" (installed: {', '.join(registry.keys(option.keys))})" if option.keys else ""
    text = (option.help + known + (f" [{unset}]" if unset else "")).replace("%", "%%")
    if field.name in config.fixed:
        text = argparse.SUPPRESS
    if option.parse is None:
        part.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = None if option.choices is None else values.chosen(option.choices)
    metavar = option.metavar or (None if choices else _METAVARS[str(field.type).partition(" ")[0]])
    part.add_argument(name, action=_Merged if option.parse in values.ADD_UP else "store", type=option.parse,
                      choices=choices, metavar=metavar, help=text)


_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}
"""What stands for a value in --help, by the value's type, if the option has no metavar of its own."""


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(
        value, float) else str(value)


def read_config(config: type[C], argv: Sequence[str] | None, *, epilog: str | None = None,
                subcommands: Subcommands | None = None,
                begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> C:
    """Read a config from the command line and the --config file. A bad value ends the process with exit code 2.

    Args:
        config: the command's config.
        argv: the arguments; None for the process's own.
        epilog: the last lines of --help.
        subcommands: the command's sub-commands.
        begun_with: returns the options of the run in the folder that --resume names. They then replace the defaults. It
            raises ValueError if there is no such run.
    """
    return config(**given_options(config, argv, epilog=epilog, subcommands=subcommands, begun_with=begun_with))


def given_options(config: type[Config], argv: Sequence[str] | None, *, epilog: str | None = None,
                  subcommands: Subcommands | None = None,
                  begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Return the options that are given, by field name: what `read_config` reads, without the defaults.

    Args:
        config: the command's config.
        argv: the arguments; None for the process's own.
        epilog: the last lines of --help.
        subcommands: the command's sub-commands.
        begun_with: as in `read_config`.
    """
    return _given(build_parser(config, epilog=epilog, subcommands=subcommands), config, argv, begun_with)


def config_from(table: Mapping[str, str | int | float | bool], config: type[C], source: str) -> C:
    """Make a config from keys and values, as Flower's run and node configurations hold them.

    Args:
        table: option → value. An option whose value is "" counts as not given.
        config: the command's config.
        source: where the table comes from, for error messages.

    Raises:
        ValueError: a key is not an option of the command, or a value is not allowed.
    """
    def complain(message: str) -> NoReturn:
        raise ValueError(f"{source}: {message.removeprefix('argument ')}")

    parser = build_parser(config)
    parser.error = complain  # type: ignore[method-assign]
    given = {key: value for key, value in table.items() if value != ""}
    return config(**_given(parser, config, arguments(given, config, source)))


def given_in_python(config: type[Config], given: Config | Path | str | None, values: Mapping[str, object], source: str,
                    begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Return the options that are given to a Python function, by field name, checked as on the command line.

    Args:
        config: the command's config.
        given: a config, of which the fields that differ from their defaults are given; or a TOML file, as --config
            names one; or None.
        values: option → value, which overrides `given`. None counts as not given.
        source: the function's name, for error messages.
        begun_with: as in `read_config`.

    Raises:
        TypeError: `given` is the config of another command.
        ValueError: a key is not an option of the command, or a value is not allowed.
    """
    def complain(message: str) -> NoReturn:
        raise ValueError(f"{source}: {message.removeprefix('argument ')}")

    if isinstance(given, Config):
        if not isinstance(given, config):
            raise TypeError(f"{source} takes a {config.__name__}, not a {type(given).__name__}")
        first = {field.name: value for field in dataclasses.fields(given) if field.name != "config"
                 and (value := getattr(given, field.name)) != _default(field)}
    else:
        first = {} if given is None else {"config": given}
    parser = build_parser(config)
    parser.error = complain  # type: ignore[method-assign]
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in (first | dict(values)).items()
              if value is not None}
    return _given(parser, config, arguments(listed, config, source), begun_with)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _given(parser: argparse.ArgumentParser, config: type[Config], argv: Sequence[str] | None,
           begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    given = parser.parse_args(argv)
    sources: dict[str, list[str]] = {}
    try:
        if begun_with is not None and "resume" in given:
            source = f"--resume {given.resume}"
            sources[source] = arguments(begun_with(given.resume), config, source)
        if "config" in given:
            sources[f"--config {given.config}"] = file_arguments(given.config, config)
    except ValueError as error:
        parser.error(str(error))
    found: dict[str, Any] = {}
    for source, told in sources.items():
        found |= _parsed(parser, told, source)
    return found | vars(given)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str], source: str) -> dict[str, Any]:
    """Parse arguments that were not given on the command line; a message about a wrong one names their source."""
    complain = parser.error
    parser.error = lambda message: complain(f"{source}: {message.removeprefix('argument ')}")  # type: ignore[method-assign]
    try:
        return vars(parser.parse_args(argv))
    finally:
        parser.error = complain  # type: ignore[method-assign]
