"""What README.md and docs/ tell a reader to type or to write is understood by what it is written for.

Commands are parsed by their own parsers and not run; TOML is read by whatever reads it; Python compiles, and what it
imports from FedLoRA exists.
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from fedlora.config import CONFIGS
from fedlora.config.toml import file_arguments, keys
from fedlora.privacy import Policy
from fedlora_simulations.reference import read_published

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

MAINS = {"fedlora-client": "fedlora_client.cli", "fedlora-server": "fedlora_server.cli",
         "fedlora-simulate": "fedlora_simulations.cli", "fedlora-adapter": "fedlora_adapter.cli",
         "python -m benchmarks": "benchmarks.cli"}
"""How a command begins → the module whose `main` runs it."""

PLACEHOLDERS = {"N": "3", "X": "0.5", "K": "3"}
"""Stand for a number where a command is described; names such as DIR and HOST can be anything."""

LACKS = ("the following arguments are required", "expected one argument")
"""How a parser says that a command line is not finished."""

POLICY_KEYS = {"dataset", "min-noise-multiplier", "max-rounds", "max-sampling-rate", "families", "models", "servers",
               "server-fingerprints", "trust"}


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        where: page and line, for errors.
        language: after the fence; "" if there is none.
    """

    where: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, without the indentation of a list that they stand in."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```\s*$", text, flags=re.MULTILINE | re.DOTALL):
        indent, language, body = found.groups()
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{page.relative_to(ROOT)}:{line}", language,
                    "".join(one.removeprefix(indent) for one in body.splitlines(keepends=True)))


def in_backticks(page: Path) -> Iterator[str]:
    """Yield the text of each code span of a page that is not in a fenced block."""
    text = re.sub(r"^ *```.*?^ *```\s*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        yield " ".join(span.split())


def beginning(line: str) -> str | None:
    """Return the command that the line begins with, if it is one of ours and something follows it."""
    return next((name for name in MAINS if line.startswith(f"{name} ")), None)


class Command(NamedTuple):
    """A command line of a page.

    Attributes:
        where: page and line, for errors.
        line: what is typed.
        is_whole: whether it can be given as it stands. One in backticks may only name a command, without arguments.
    """

    where: str
    line: str
    is_whole: bool


def commands(page: Path) -> Iterator[Command]:
    """Yield each command line of ours on a page."""
    for block in blocks(page):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            if beginning(line := line.strip().removeprefix("$ ")):
                yield Command(block.where, line, is_whole=True)
    for span in in_backticks(page):
        if beginning(span):
            yield Command(str(page.relative_to(ROOT)), span, is_whole=False)


def typed(name: str, line: str) -> list[str]:
    """Return the arguments that a reader would type: without a comment, with numbers for placeholders."""
    words = shlex.split(line, comments=True)[len(name.split()):]
    return [PLACEHOLDERS.get(word, word) for word in words if word != "…"]


class Parsed(BaseException):
    """The command line was understood; the command is not to be run."""


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a command parse its arguments, and do nothing else.

    Raises:
        SystemExit: with 0 after --help; else it did not understand them, and stderr says why.
    """
    real: Callable[..., argparse.Namespace] = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, *given: object, **named: object) -> argparse.Namespace:
        real(parser, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with mock.patch.dict(os.environ), pytest.raises(Parsed):
        importlib.import_module(module).main(arguments)
        raise AssertionError("the command ran without parsing its arguments")


DOCUMENTED = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda command: f"{command.where} {command.line}")
def test_every_documented_command_line_is_understood_by_its_command(command, monkeypatch, capfd):
    name = beginning(command.line)
    assert name is not None
    try:
        parse(MAINS[name], typed(name, command.line), monkeypatch)
    except SystemExit as ended:
        said = capfd.readouterr().err
        only_named = not command.is_whole and any(lack in said for lack in LACKS)
        assert ended.code == 0 or only_named, f"{command.where}: {command.line}\n{said}"


def test_the_pages_document_every_command():
    whole = [command.line for command in DOCUMENTED if command.is_whole]
    assert {beginning(line) for line in whole} == set(MAINS)
    assert {"budget", "verify", "forget", "audit", "poison", "compare"} <= {word for line in whole
                                                                            for word in line.split()}


@pytest.mark.parametrize("line", ["fedlora-server --roundz 3", "fedlora-client --epsilon much", "fedlora-client verify",
                                  "fedlora-simulate --strategy fed-sb:gradients", "fedlora-server forget north"])
def test_a_command_line_that_is_wrong_is_noticed(line, monkeypatch, capfd):
    name = beginning(line)
    with pytest.raises(SystemExit) as ended:
        parse(MAINS[name], typed(name, line), monkeypatch)
    assert ended.value.code == 2
    assert "error" in capfd.readouterr().err


def of(language: str) -> list[object]:
    """Return the blocks of one language, as parameters of a test."""
    return [pytest.param(block, id=block.where) for page in PAGES for block in blocks(page)
            if block.language == language]


@pytest.mark.parametrize("block", of("toml"))
def test_every_documented_toml_is_read_by_what_it_is_written_for(block, tmp_path):
    path = tmp_path / "documented.toml"
    path.write_text(block.text, encoding="utf-8")
    table = tomllib.loads(block.text)
    if table.keys() & POLICY_KEYS:
        policy = Policy.read(path)
        assert set(policy.datasets) == set(table.get("dataset", {}))
    elif table.keys() & CONFIGS.keys() or table.keys() <= {key for config in CONFIGS.values() for key in keys(config)}:
        for config in CONFIGS.values():
            assert file_arguments(path, config)
    elif "figure" in table:
        assert read_published(path)
    else:
        assert "superlink" in table, f"{block.where}: neither a policy, nor options, nor Flower's configuration"


@pytest.mark.parametrize("block", of("python"))
def test_every_documented_python_compiles_and_imports_what_exists(block):
    tree = ast.parse(block.text, block.where)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedlora"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block.where}: {ast.unparse(node)}"
