"""fedlora-server kit: the plan that it writes is the one that the server proposes, to whoever can call the address."""

import dataclasses
from io import StringIO

import pytest
from rich.console import Console

from fedlora.config import ServerConfig, read_config
from fedlora.kit import NO_RUN, Kit, read_kit
from fedlora_server.app import serve
from fedlora_server.cli import main
from fedlora_server.pki.authority import SERVER_NAME, Authority
from tests.fedlora.test_plan import make_plan


class Proposed(Exception):
    """A server was about to listen."""


def proposed(*words):
    """Return the plan that a server with these options would propose."""

    def listen(proposal, uploads, notify):
        raise Proposed(proposal.plan)

    options = read_config(ServerConfig, [str(word) for word in words])
    with pytest.raises(Proposed) as stopped:
        serve(options, Console(file=StringIO()), listen=listen)
    return stopped.value.args[0]


RUNS = {
    "labels": ("--labels", "routine,urgent", "--rounds", 3, "--batch-size", 32),
    "labels of the clients": ("--strategy", "ffa-lora", "--clip-norm", 0.5, "--max-participations", 5),
    "no privacy": ("--labels", "routine,urgent", "--privacy", "off", "--dropout", 0.1),
    "private start": ("--labels", "routine,urgent", "--strategy", "fed-sb", "--init", "dp", "--head", "freeze"),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_plan_in_a_kit_is_the_one_that_the_server_proposes(tmp_path, checkpoint, run, capsys):
    words = ["--model", str(checkpoint("bert")), *map(str, RUNS[run])]
    assert main(["kit", "--out", str(tmp_path / "kit.toml"), *words]) == 0
    kit, told = read_kit(tmp_path / "kit.toml"), capsys.readouterr().out
    assert dataclasses.replace(proposed("--out", tmp_path / "run", *words), run_id=NO_RUN) == kit.plan
    assert kit.fingerprint in told and "fedlora-client join kit.toml" in told
    assert "Send the base model's folder too" in told and "clients elsewhere cannot use this kit" in told
    assert ("names no labels" in told) == (run == "labels of the clients")
    assert ("needs 160 records" in told) == (run == "labels")


def test_a_kit_has_the_authority_the_key_and_the_columns_and_no_secret(tmp_path, checkpoint):
    authority = Authority.create(tmp_path / "pki", ["fl.example.org", "10.0.0.7"])
    out = tmp_path / "kit.toml"
    for address in ("fl.example.org:9092", "10.0.0.7:9092"):  # the second kit takes the place of the first
        assert main(["kit", "--out", str(out), "--address", address, "--tls", str(authority.folder), "--model",
                     str(checkpoint("bert")), "--column", "text=note,label=triage"]) == 0
        kit = read_kit(out)
        assert kit.address == address and kit.columns == {"text": "note", "label": "triage"}
        assert kit.authority == (authority.folder / "ca.pem").read_text()
        assert kit.server_fingerprint == authority.issued()[SERVER_NAME].fingerprint
    assert "PRIVATE" not in out.read_text() and str(tmp_path) not in out.read_text()


def test_the_file_of_a_run_is_taken_and_its_folder_left_alone(tmp_path, checkpoint, capsys):
    file = tmp_path / "run.toml"
    file.write_text(f'model = "{checkpoint("bert")}"\n[server]\nout = "{tmp_path / "run"}"\nrounds = 3\n'
                    'address = "0.0.0.0:9092"\nlabels = ["a", "b"]\ninsecure = true\n')
    assert main(["kit", "--config", str(file)]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert main(["kit", "--config", str(file), "--out", str(tmp_path / "kit.toml")]) == 2
    assert "0.0.0.0:9092 is an address to listen on" in capsys.readouterr().err
    assert main(["kit", "--config", str(file), "--out", str(tmp_path / "kit.toml"), "--address", "host:9"]) == 0
    kit = read_kit(tmp_path / "kit.toml")
    assert (kit.address, kit.plan.rounds, kit.plan.labels) == ("host:9", 3, ("a", "b"))
    assert not (tmp_path / "run").exists()


REFUSED = {
    "any address": (("--address", "[::]:9092"), "is an address to listen on"),
    "any port": (("--address", "fl.example.org:0"), "is an address to listen on"),
    "no host": (("--address", ":9092"), "host:port"),
    "no port": (("--address", "fl.example.org"), "host:port"),
    "no encryption": (("--address", "fl.example.org:9092"), "without encryption; give --tls DIR"),
    "another host": (("--address", "fl.example.com:9092", "--tls", "pki"), "made with --host fl.example.com"),
    "no identity": (("--tls", "nothing"), "there is no folder nothing"),
    "a run to resume": (("--resume", "runs/a"), "--resume runs/a"),
    "another file": (("--out", "pki/ca.pem"), "exists and is not a kit"),
    "no such model": (("--model", "models/none"), "models/none"),
    "options that contradict each other": (("--rounds", "3", "--max-participations", "4"), "more than the 3 rounds"),
    "too few clients": (("--reduction", "multi-krum"), "raise --min-clients"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_clients_could_not_use_is_refused_and_nothing_written(tmp_path, checkpoint, monkeypatch, capsys, case):
    words, says = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Authority.create(tmp_path / "pki", ["fl.example.org"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    assert main(["kit", "--out", "kit.toml", "--model", str(checkpoint("bert")), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "kit.toml").exists()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}


def test_a_kit_that_was_damaged_may_be_made_anew(tmp_path, checkpoint):
    out = tmp_path / "kit.toml"
    out.write_text(Kit("127.0.0.1:9092", make_plan()).text()[:900])
    assert main(["kit", "--out", str(out), "--model", str(checkpoint("bert"))]) == 0
    assert read_kit(out).plan.strategy == "fedsvd"
