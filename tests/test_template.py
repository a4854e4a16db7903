"""The TOML file that `init` writes: every option, commented out, with a value that can be read back."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fedlora.config import CONFIGS, GROUPS, flag, options_of, read_config
from fedlora.config.template import template
from fedlora.config.toml import NOT_IN_A_FILE
from fedlora_client.init import main as init_client
from fedlora_server.init import default_preset
from fedlora_server.init import main as init_server
from fedlora_simulations.init import main as init_simulate

MAINS = {"client": init_client, "server": init_server, "simulate": init_simulate}
SET = re.compile(r"^#(?=[a-z])", re.MULTILINE)
"""The beginning of a line that sets an option if its # is taken away."""


@pytest.fixture(params=CONFIGS)
def command(request):
    return request.param


@pytest.fixture
def text(command):
    return template(CONFIGS[command], {} if command == "client" else default_preset(), "run.toml")


def read(command: str, path: Path, text: str) -> object:
    """Return the config that the command makes of a file."""
    path.write_text(text)
    return read_config(CONFIGS[command], [f"--config={path}"])


def test_the_file_names_every_option_with_its_help_in_the_groups_of_help(command, text):
    known = options_of(CONFIGS[command])
    named = [line.split(" = ")[0] for line in SET.sub("", text).splitlines() if not line.startswith("#") and line]
    assert sorted(named) == sorted(flag(name) for name in known if name not in NOT_IN_A_FILE)
    headings = re.findall(r"^# ──── (\w+) ", text, re.MULTILINE)
    assert tuple(headings) == GROUPS
    flowing = re.sub(r"\n# ", " ", text)
    assert all(option.help[1:] in flowing for name, option in known.items() if name not in NOT_IN_A_FILE)
    assert max(map(len, text.splitlines())) <= 120


def test_the_unchanged_file_gives_the_defaults(command, text, tmp_path):
    path = tmp_path / "run.toml"
    assert read(command, path, text) == CONFIGS[command](config=path)


def test_each_line_without_its_comment_sign_is_read_and_so_are_all_together(command, text, tmp_path):
    path, config = tmp_path / "run.toml", CONFIGS[command]
    for found in SET.finditer(text):
        one = text[:found.start()] + text[found.end():]
        [name] = tomllib.loads(one)
        read(command, path, one)
        default = next(field.default for field in dataclasses.fields(config) if flag(field.name) == name)
        if default not in (None, (), dataclasses.MISSING):
            assert read(command, path, one) == config(config=path), name
    assert dataclasses.fields(read(command, path, SET.sub("", text)))


def test_values_of_presets_are_those_of_the_default_strategy():
    shown = tomllib.loads(SET.sub("", template(CONFIGS["server"], default_preset(), "run.toml")))
    assert {name: shown[flag(name)] for name in ("rounds", "rank", "lr")} == {
        name: default_preset()[name] for name in ("rounds", "rank", "lr")}


def test_init_writes_the_file_and_overwrites_none(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MAINS[command]([]) == 0
    written = (tmp_path / f"{command}.toml").read_text()
    assert f"fedlora-{command} --config {command}.toml" in written and capsys.readouterr().out.count("\n") == 2
    assert MAINS[command]([]) == 2
    assert f"{command}.toml exists already; name a new file with --out" in capsys.readouterr().err
    assert MAINS[command](["--out", str(tmp_path / "no" / "such.toml")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err
    assert (tmp_path / f"{command}.toml").read_text() == written
