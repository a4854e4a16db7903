"""The command reference: every option of every command, from the parsers that the commands use."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]


class _Caught(BaseException):
    """Raised in place of parsing. No command expects it."""


def commands() -> Mapping[str, argparse.ArgumentParser]:
    """Return command → parser, of the four commands, their sub-commands, and the benchmarks."""
    found: dict[str, argparse.ArgumentParser] = {}
    for package in ("client", "server", "simulations", "adapter"):
        cli = importlib.import_module(f"fedlora_{package}.cli")
        for arguments in ([], *([name] for name in cli.SUBCOMMANDS)):
            _catch(found, lambda main=cli.main, arguments=arguments: main(arguments))
    if (ROOT / "benchmarks" / "__main__.py").exists():
        with mock.patch.object(sys, "argv", ["benchmarks"]), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
            _catch(found, lambda: runpy.run_module("benchmarks", run_name="__main__"))
    for name, parser in list(found.items()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{name} {key}": sub for key, sub in action.choices.items()}
    return {name: found[name] for name in sorted(found)}


def _catch(found: dict[str, argparse.ArgumentParser], command: Callable[[], object]) -> None:
    """Start a command and take the parser that it is about to use, with the process left as it was."""
    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Caught(parser)

    before = signal.getsignal(signal.SIGTERM)
    with (mock.patch.object(argparse.ArgumentParser, "parse_args", catch), mock.patch.dict(os.environ),
          mock.patch("logging.basicConfig")):
        try:
            command()
        except _Caught as caught:
            parser = caught.args[0]
            found.setdefault(parser.prog, parser)
        except SystemExit:
            pass  # a command that has moved and says where to
    signal.signal(signal.SIGTERM, before)


def commands_page() -> str:
    """Return the page: for each command what it does, how it is called, and a table for each group of options."""
    lines = ["# Commands", "",
             "Every option of every command, from the parsers that the commands use. A value comes from, in falling "
             "order: the command line, the command's table in the `--config` file, that file's top level, the run that "
             "is resumed, the strategy's preset, the default. *preset*: `fedlora-server presets` shows it. Every "
             "command and sub-command has `--help` and `--version`."]
    found = commands()
    tables_of = {name: {group.title: rows for group in parser._action_groups if (rows := _rows(group))}
                 for name, parser in found.items()}
    shown: list[dict[str | None, list[str]]] = []
    for name, parser in found.items():
        tables = tables_of[name]
        if tables in shown:
            continue
        shown.append(tables)
        if list(tables_of.values()).count(tables) > 1:  # sub-commands that differ in nothing but their name
            lines += ["", f"## {name.rpartition(' ')[0]} …", "", "Each of these sub-commands has these options:"]
        else:
            lines += ["", f"## {name}", "", *_description(parser)]
        for title, rows in tables.items():
            heading = [f"**{title}**", ""] if title and title != "options" else []
            lines += ["", *heading, "| option | default | meaning |", "|---|---|---|", *rows]
        if parser.epilog:
            lines += ["", escaped(parser.epilog)]
    return "\n".join(lines) + "\n"


def _rows(group: argparse._ArgumentGroup) -> list[str]:
    shown = [action for action in group._group_actions
             if action.help != argparse.SUPPRESS and not set(action.option_strings) & {"--help", "--version"}]
    return [row for action in shown for row in _row(action)]


def _description(parser: argparse.ArgumentParser) -> Iterator[str]:
    for paragraph in inspect.cleandoc(parser.description or "").split("\n\n"):
        if paragraph.startswith("    "):  # a table or an example
            yield from ("", "```text", paragraph.rstrip(), "```")
        else:
            yield from ("", escaped(" ".join(paragraph.split())))
    if parser.usage:
        usage = re.sub(r"\n\s+", "\n", parser.usage.strip())
    else:
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    yield from ("", "```text", usage, "```")


def _row(action: argparse.Action) -> Iterator[str]:
    """Yield the row of an option, or one for each sub-command."""
    if isinstance(action, argparse._SubParsersAction):
        for choice in action._choices_actions:
            yield f"| `{choice.dest}` | | {escaped((choice.help or '').replace('%%', '%'))} |"
        return
    names = " ".join(f"`{name}`" for name in action.option_strings)
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else
                               "" if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) else
                               action.dest.upper())
    text = (action.help or "").replace("%%", "%")
    default = ""
    if match := re.fullmatch(r"(.*\S) \[([^\[\]]+)\]", text, re.DOTALL):
        text, default = match.groups()
    yield f"| {names}{f' `{value}`' if value else ''} | {escaped(default)} | {escaped(text)} |"


def escaped(text: str) -> str:
    """Show options as code, and let no character of a text be taken for Markdown."""
    text = re.sub(r"([*_|\[\]])", r"\\\1", text.replace("`", "'").replace("<", "&lt;"))
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", text)
