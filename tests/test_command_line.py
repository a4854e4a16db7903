"""What every command understands and says: --version, options and sub-commands that it does not have, --help."""

import importlib
import platform
from importlib.metadata import version

import pytest

import fedlora
from fedlora.plan import PROTOCOL
from fedlora_simulations import audit, poison

PACKAGES = {"fedlora-client": "fedlora_client", "fedlora-server": "fedlora_server",
            "fedlora-simulate": "fedlora_simulations", "fedlora-adapter": "fedlora_adapter"}
SUBCOMMANDS = {name: importlib.import_module(f"{package}.cli").SUBCOMMANDS for name, package in PACKAGES.items()}
EVERY = [*PACKAGES, "fedlora-server pki sign", *(f"{name} {sub}" for name, known in SUBCOMMANDS.items()
                                                 for sub in known)]


def called(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Call a command in this process; return its exit code, its stdout and its stderr."""
    name, *argv = line.split()
    try:
        code = importlib.import_module(f"{PACKAGES[name]}.cli").main(argv)
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", EVERY)
def test_every_command_and_sub_command_tells_its_versions(command, capsys):
    code, out, _ = called(f"{command} --version", capsys)
    assert code == 0 and out.startswith(f"{command.split()[0]} {fedlora.__version__}, protocol {PROTOCOL}\n")
    assert f"Python {platform.python_version()}" in out and f"torch {version('torch')}" in out
    assert "installed in " in out.splitlines()[-1]


@pytest.mark.parametrize(("line", "told"), [
    ("fedlora-server --roundz 3", "--roundz is not an option of fedlora-server; did you mean --rounds?"),
    ("fedlora-server --batch_size=3", "--batch_size is not an option of fedlora-server; did you mean --batch-size?"),
    ("fedlora-server -rounds 3", "-rounds is not an option of fedlora-server; did you mean --rounds?"),
    ("fedlora-server --no-insecur", "did you mean --no-insecure?"),
    ("fedlora-server --verison", "did you mean --version?"),
    ("fedlora-server --data x", "--data is an option of fedlora-client and fedlora-simulate, not of fedlora-server"),
    ("fedlora-client --roundz 3", "did you mean --rounds? That is an option of fedlora-server and fedlora-simulate"),
    ("fedlora-client --state x --zebra", "error: --zebra is not an option of fedlora-client\n"),
    ("fedlora-client budget --polcy x", "not an option of fedlora-client budget; did you mean --policy?"),
    ("fedlora-client budget --epsilon 3", "--epsilon is an option of fedlora-client and fedlora-simulate, not of "
                                          "fedlora-client budget"),
    ("fedlora-server pki list --pky x", "not an option of fedlora-server pki list; did you mean --pki?"),
    ("fedlora-server pkii", "'pkii' is not a sub-command; did you mean 'pki'? Sub-commands are init, presets"),
    ("fedlora-client notes.csv", "'notes.csv' is not a sub-command. Sub-commands are init, check, join, enroll, "
                                 "budget, verify, attach-audit; options begin with --"),
    ("fedlora-simulate odit --data x", "did you mean 'audit'?"),
    ("fedlora-server --rounds 3 pki", "'pki' must be the first word after the command: fedlora-server pki"),
    ("fedlora-server --labels a, b", "'b' belongs to no option; put a value that has spaces into quotes"),
    ("fedlora-server --epsilon=3 --roundz=3", "--epsilon is an option of fedlora-client and fedlora-simulate, not of "
                                              "fedlora-server; --roundz is not")])
def test_what_a_command_does_not_have_is_told_in_one_line_with_what_may_be_meant(line, told, capsys):
    code, out, err = called(line, capsys)
    assert code == 2 and not out
    assert told in err and err.count("\n") == 1 and err.startswith(line.split()[0])


def test_help_breaks_no_option_at_a_hyphen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in PACKAGES:
        lines = called(f"{command} --help", capsys)[1].splitlines()
        assert not [line for line in lines if line.endswith("-") and not line.endswith("--")]


@pytest.mark.parametrize("module", [audit, poison])
def test_a_study_s_help_leaves_out_the_options_that_it_refuses(module, capsys):
    name = module.__name__.rpartition(".")[2]
    code, out, _ = called(f"fedlora-simulate {name} --help", capsys)
    assert code == 0 and "--strategy " in out
    assert not [field for field in module.FIXED if f"--{field.replace('_', '-')} " in out]
    assert called(f"fedlora-simulate {name} --workers 2 --data x --eval-data y", capsys)[0] == 2


@pytest.mark.parametrize("command", PACKAGES)
def test_help_names_every_sub_command(command, capsys):
    out = " ".join(called(f"{command} --help", capsys)[1].split())
    assert all(f"`{command} {name}` {one.about}" in out for name, one in SUBCOMMANDS[command].items())
    assert f"{{{','.join(SUBCOMMANDS[command])}}}" in out
