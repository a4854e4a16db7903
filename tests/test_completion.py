"""Completion in a shell: the printed script, sourced by a real bash, offers what the commands take."""

import builtins
import shutil
import subprocess

import pytest

from fedlora_adapter.cli import main as adapter
from fedlora_client.cli import main as client
from fedlora_server.cli import main as server
from fedlora_simulations.cli import main as simulate

MAINS = {"fedlora-client": client, "fedlora-server": server, "fedlora-simulate": simulate,
         "fedlora-adapter": adapter}

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
completer=$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$completer" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
echo "${COMPREPLY[@]}"
"""
"""What bash does when the tab key is pressed after the words that are given."""


def script(command: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        MAINS[command](["--print-completion", shell])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("command", "asked"), [
    ("fedlora-server", {
        ("p",): {"presets", "pki", "predict"}, ("predict", "--prob"): {"--probabilities"},
            ("pki", ""): {"init", "sign", "invite", "renew", "revoke", "list"},
        ("--strategy", "ff"): {"ffa-lora"}, ("--reduction", "me"): {"mean", "median"},
        ("--init", "public"): {"public:"}, ("--rou",): {"--rounds", "--round-timeout"},
        ("--insecure", "--wire-dtype", ""): {"fp32", "bf16"}, ("pki", "sign", "--d"): {"--days"}}),
    ("fedlora-client", {("b",): {"budget"}, ("budget", "--pol"): {"--policy"}, ("--device", "c"): {"cpu", "cuda"},
                        ("--rou",): set()}),
    ("fedlora-simulate", {("a",): {"audit"}, ("audit", "--can"): {"--canaries"}, ("audit", "--work"): set(),
                          ("--engine", ""): {"in-process", "ray"}})])
def test_bash_offers_sub_commands_options_and_words(command, asked, tmp_path, capsys):
    pytest.importorskip("shtab")
    path = tmp_path / "completion.bash"
    path.write_text(script(command, "bash", capsys))
    for words, offered in asked.items():
        done = subprocess.run(["bash", "--norc", "-c", ASK, "bash", path, command, *words], capture_output=True,
                              text=True, check=True)
        assert set(done.stdout.split()) == offered, (words, done.stdout, done.stderr)


def test_zsh_has_a_script_too(capsys):
    pytest.importorskip("shtab")
    text = script("fedlora-server", "zsh", capsys)
    assert text.startswith("#compdef fedlora-server") and "fedavg-lora" in text and "--round-timeout" in text


def test_without_shtab_the_command_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def without_shtab(name, *arguments, **named):
        if name == "shtab":
            raise ModuleNotFoundError("No module named 'shtab'", name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_shtab)
    with pytest.raises(SystemExit) as ended:
        server(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert "--print-completion needs shtab: pip install 'fedlora[completion]'" in capsys.readouterr().err
