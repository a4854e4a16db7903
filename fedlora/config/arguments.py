"""The parser of every command and sub-command: its --help, its --version, and errors that fit into one line."""

from __future__ import annotations

import argparse
import platform
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

import fedlora
from fedlora.config.commands import not_an_option
from fedlora.plan import PROTOCOL
from fedlora.versions import versions

SHOWN = ("torch", "transformers", "peft", "opacus", "flwr")
"""Packages whose versions --version shows."""


class _Help(argparse.HelpFormatter):
    """The layout of --help: lines are not broken at hyphens, so that an option's name stays whole."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    @override
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent,
                             break_on_hyphens=False)


class _Version(argparse.Action):
    """The action of --version. The text is made only when it is asked for."""

    @override
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> NoReturn:
        print(version(parser.prog))
        parser.exit()


def version(prog: str) -> str:
    """Return what --version prints: the versions of FedLoRA and of what it runs on, and where it is installed.

    Args:
        prog: the command.
    """
    found = ", ".join(f"{name} {number or 'not installed'}" for name, number in versions(SHOWN).items())
    return (f"{prog.split()[0]} {fedlora.__version__}, protocol {PROTOCOL}\n"
            f"Python {platform.python_version()}, {found}\n"
            f"installed in {Path(fedlora.__file__).resolve().parent.parent}")


class Parser(argparse.ArgumentParser):
    """A command's parser. It takes no abbreviations, and it says what an unknown option may be meant to be.

    Args:
        subcommands: names of the command's sub-commands, for errors. `run_subcommand` runs them, not this parser.
        add_help: whether to add --help and --version at once; `add_help_to` adds them to a group.
        **settings: what `argparse.ArgumentParser` takes.
    """

    def __init__(self, *, subcommands: Iterable[str] = (), add_help: bool = True, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Help)
        super().__init__(add_help=False, allow_abbrev=False, **settings)
        self.subcommands = tuple(subcommands)
        if add_help:
            self.add_help_to(self)

    @staticmethod
    def add_help_to(container: argparse._ActionsContainer) -> None:
        """Add --help and --version to the parser, or to one of its groups."""
        container.add_argument("-h", "--help", action="help", help="show this help and exit")
        container.add_argument("--version", action=_Version, nargs=0, dest=argparse.SUPPRESS,
                               default=argparse.SUPPRESS, help="show the versions of FedLoRA and its parts, and exit")

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    @override
    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]  # no overloads
                         namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(args, argparse.Namespace() if namespace is None else namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found, unknown

    def _unknown(self, arguments: Sequence[str]) -> str:
        """Return a message about arguments that nothing takes."""
        options = [given.partition("=")[0] for given in arguments if given.startswith("-") and len(given) > 1]
        if options:
            own = [name.lstrip("-") for action in self._actions if action.help != argparse.SUPPRESS
                   for name in action.option_strings]
            return "; ".join(not_an_option(given.lstrip("-").replace("_", "-"), self.prog, own, given, "--{}".format)
                             for given in options)
        given = arguments[0]
        if given in self.subcommands:
            return f"{given!r} must be the first word after the command: {self.prog} {given}"
        return f"{given!r} belongs to no option; put a value that has spaces into quotes"

