"""docs/exit-codes.md has every command, and says what the commands' own --help says."""

import importlib.util
import re
from pathlib import Path

import pytest

from fedlora_client.check_command import EXIT_CODES as CHECK_CODES
from fedlora_client.cli import EPILOG
from fedlora_client.verify_command import EXIT_CODES as VERIFY_CODES
from fedlora_server.cli import EXIT_CODES
from fedlora_server.operations.command import STATUS_CODES, STOP_CODES

ROOT = Path(__file__).parents[1]
TOLD = {"fedlora-server": EXIT_CODES, "fedlora-client": EPILOG, "fedlora-client check": CHECK_CODES,
        "fedlora-server status": STATUS_CODES, "fedlora-server stop": STOP_CODES, "fedlora-client verify": VERIFY_CODES}
"""Command → the text at the end of its --help."""


def table() -> dict[str, dict[int, str]]:
    """Return command → exit code → its meaning, as the page has them."""
    found: dict[str, dict[int, str]] = {}
    name = ""
    for command, code, meaning in re.findall(r"^\| (?:`([\w -]+)`)? ?\| (\d+) \| ([^|]+) \|",
                                             (ROOT / "docs" / "exit-codes.md").read_text("utf-8"), flags=re.MULTILINE):
        name = command or name
        assert int(code) not in found.setdefault(name, {}), f"{name} has exit code {code} twice"
        found[name][int(code)] = meaning
    return found


def codes(text: str) -> dict[int, str]:
    """Return exit code → its meaning, of a text such as "exit codes: 0 done; 2 wrong input. Also: …"."""
    listed = text.partition("exit codes: ")[2].partition(" Also: ")[0]
    pairs = re.findall(r"(?:^|[;,] )(\d+) (.*?)(?=[;,] \d+ |$)", listed)
    return {int(code): meaning for code, meaning in pairs}


def commands() -> dict[str, object]:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "generate" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.commands()


def test_every_command_of_server_and_client_is_in_the_table():
    two_words = {" ".join(name.split()[:2]) for name in commands()}
    ours = {name for name in two_words if name.startswith(("fedlora-server", "fedlora-client"))}
    assert table().keys() == ours, "docs/exit-codes.md needs a row for each code of every command"


@pytest.mark.parametrize("command", TOLD)
def test_the_table_has_the_codes_that_help_tells(command):
    told, documented = codes(TOLD[command]), table()[command]
    assert told.keys() == documented.keys() and len(told) >= 3
    assert commands()[command].epilog == TOLD[command]
    words = {code: set(re.findall(r"[a-z]{4,}", text.lower())) for code, text in told.items()}
    unlike = [code for code, text in documented.items()
              if not words[code] & set(re.findall(r"[a-z]{4,}", text.lower()))]
    assert not unlike, "the page and --help do not say the same of these codes"


@pytest.mark.parametrize("command", ["server", "client"])
def test_codes_of_the_command_s_source_are_in_the_table(command):
    source = (ROOT / command / f"fedlora_{command}" / "cli.py").read_text("utf-8")
    run = source[source.index("def _run("):]
    returned = {int(code) for code in re.findall(r"return (\d+)", source)}
    returned |= {int(code) for found in re.findall(r"\": (\d+)[,}]|else (\d+)$", run, re.MULTILINE)
                 for code in found if code}
    assert returned <= table()[f"fedlora-{command}"].keys() and returned
