"""The sub-commands of a command. Each is a module of its own, which is imported only when its name is given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module

from fedlora.config.commands import closest


@dataclass(frozen=True)
class Subcommand:
    """One sub-command.

    Attributes:
        module: the module with its `main`, which takes the arguments and returns the exit code; or "module:function"
            for another name. If the module has a function `parser` too (`function_parser`), which returns the parser,
            shell completion knows its options.
        about: what it does, in a few words.
    """

    module: str
    about: str

    def load(self) -> tuple[Callable[[Sequence[str]], int], Callable[[], argparse.ArgumentParser] | None]:
        """Import the module and return its main function, and the one that returns the parser if there is one."""
        name, _, function = self.module.partition(":")
        module = import_module(name)
        return getattr(module, function or "main"), getattr(module, f"{function}_parser".lstrip("_"), None)


def faults_in_words(prog: str) -> Callable[[Callable[[Sequence[str]], int]], Callable[[Sequence[str]], int]]:
    """Return a decorator for a main function, under which a fault becomes a line on stderr and exit code 2.

    A fault is a ValueError or a MemoryError, whose text is shown, or an OSError, whose file is named.

    Args:
        prog: the command and its sub-command, as in "fedlora-server pki".
    """

    def decorated(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
        @wraps(main)
        def told(argv: Sequence[str]) -> int:
            try:
                return main(argv)
            except (ValueError, MemoryError) as error:
                print(f"{prog}: {error}", file=sys.stderr)
            except OSError as error:
                print(f"{prog}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
            return 2

        return told

    return decorated


Subcommands = Mapping[str, Subcommand]
"""The sub-commands of one command, by name."""


def run_subcommand(argv: Sequence[str], prog: str, known: Subcommands) -> int | None:
    """Run the sub-command that the first argument names, and return its exit code.

    Args:
        argv: the command's arguments.
        prog: the command, as in "fedlora-server".
        known: its sub-commands.

    Returns:
        The exit code; 2 if the first argument is neither an option nor a sub-command; None if it is an option or there
        is none.
    """
    if not argv or argv[0].startswith("-"):
        return None
    if argv[0] not in known:
        print(f"{prog}: error: {argv[0]!r} is not a sub-command{closest(argv[0], known)} Sub-commands are "
              f"{', '.join(known)}; options begin with --", file=sys.stderr)
        return 2
    return known[argv[0]].load()[0](argv[1:])


def listed(prog: str, known: Subcommands) -> str:
    """Return the end of --help that names the sub-commands."""
    return "Also: " + "; ".join(f"`{prog} {name}` {one.about}" for name, one in known.items()) + "."
