"""Completion in a shell: --print-completion writes a script that knows the command's sub-commands, options and words.

The script is made once, by shtab. Completing imports nothing and starts no Python.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from fedlora import registry
from fedlora.config import values
from fedlora.config.option import options_of
from fedlora.config.shared import Config
from fedlora.config.subcommands import Subcommand, Subcommands

SHELLS = ("bash", "zsh")


def add_completion(part: argparse._ActionsContainer, config: type[Config] | None, subcommands: Subcommands) -> None:
    """Add --print-completion to a command's parser.

    Args:
        part: the group of --help that it stands in, or the parser.
        config: the command's config; None if it has none.
        subcommands: the command's sub-commands.
    """

    class Print(argparse.Action):
        @override
        def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                     option_string: str | None = None) -> NoReturn:
            try:
                print(script(parser, config, subcommands, values))
            except ModuleNotFoundError as error:
                if error.name != "shtab":
                    raise
                parser.error("--print-completion needs shtab: pip install 'fedlora[completion]', or shtab itself")
            parser.exit()

    part.add_argument("--print-completion", action=Print, choices=SHELLS, dest=argparse.SUPPRESS,
                      default=argparse.SUPPRESS, help="print a script that completes this command in a shell, and exit")


def script(parser: argparse.ArgumentParser, config: type[Config] | None, subcommands: Subcommands,
           shell: str) -> str:
    """Return the script for a shell.

    Args:
        parser: the command's parser; it is changed, and must not parse afterwards.
        config: the command's config; None if it has none.
        subcommands: the command's sub-commands.
        shell: one of `SHELLS`.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    import shtab

    known = {f"{parser.prog} {name}": _parser_of(one, f"{parser.prog} {name}")
             for name, one in subcommands.items()}
    if config is not None:
        add_words(parser, config)
    parts = parser.add_subparsers(  # type: ignore[call-overload]  # typeshed asks for a class; any callable will do
        parser_class=lambda prog, **_: known[prog], prog=parser.prog)
    for name, one in subcommands.items():
        parts.add_parser(name, help=one.about)
    _add_files(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _parser_of(subcommand: Subcommand, prog: str) -> argparse.ArgumentParser:
    """Return the parser of a sub-command; one without options if its module has no function for it."""
    make = subcommand.load()[1]
    return argparse.ArgumentParser(prog=prog) if make is None else make()


def add_words(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Give the options whose parser knows the words, without `choices`, those words as choices."""
    known = options_of(config)
    takes = {name: registry.literals(values.STARTS, name, "START").get("takes")
             for name in registry.keys(values.STARTS)}
    for action in parser._actions:
        option = known.get(action.dest)
        if option is not None and option.keys:
            action.choices = registry.keys(option.keys)
        elif option is not None and option.parse is values.start:
            action.choices = [f"{name}:" if what else name for name, what in takes.items()]


def _add_files(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Let the options whose value is a path complete as files or folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _add_files(part, file, folder)
        elif action.type in (Path, values.path) or action.metavar in ("DIR_OR_FILE", "PATH"):
            action.complete = folder if action.metavar == "DIR" else file  # type: ignore[attr-defined]  # for shtab
