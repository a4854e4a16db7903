"""From two empty folders to an adapter: a coordinator and a hospital, each with its own commands, over TLS."""

import shutil

import pytest

from fedlora.privacy import Policy
from fedlora_server.cli import main as server
from tests.processes import start, write_rows
from tests.terminal import Terminal


@pytest.fixture
def coordinator(deploy, tmp_path, monkeypatch):
    """Return a deployment whose coordinator has an authority and a kit of a run of two rounds."""
    run = deploy("run")
    monkeypatch.chdir(tmp_path)
    run.options = ["--tls", "pki", "--strategy", "ffa-lora", "--labels", "routine,urgent", "--rounds", "2",
                   "--local-steps", "2", "--batch-size", "8", "--model", str(run.checkpoint)]
    assert server(["pki", "init", "--host", "127.0.0.1"]) == 0
    assert server(["kit", "--out", "kit.toml", "--address", run.address, *run.options]) == 0
    return run


def test_a_kit_a_request_and_a_certificate_are_all_that_is_exchanged(coordinator, tmp_path, capsys):
    hospital = tmp_path / "hospital"
    rows = write_rows(hospital / "records" / "notes.jsonl", 0)
    shutil.copy(tmp_path / "kit.toml", hospital / "kit.toml")
    home, log = coordinator.home("north"), tmp_path / "north.log"
    words = ("join", hospital / "kit.toml", "--model", coordinator.checkpoint, "--threads", 1, "--device", "cpu",
             "--precision", "fp32", "--tls", hospital / "tls", "--privacy-unit", "row")
    first = start("client", *words, "--yes", "--data", rows, "--epsilon", 6, "--declared-size", 120, "--name", "north",
                  log=log, home=home)
    assert first.wait(240) == 1 and "Start the same command again" in log.read_text()

    assert server(["pki", "sign", str(hospital / "tls" / "request.csr"), "--out", "north.pem"]) == 0
    told = capsys.readouterr().out.split("Compare the fingerprint with its owner:\n")[1].splitlines()[0]
    assert told.strip() in log.read_text()
    shutil.copy(tmp_path / "north.pem", hospital / "tls" / "certificate.pem")

    coordinator.server(*coordinator.options, "--min-clients", 1)
    second = Terminal("client", *words, home=home, cwd=hospital)
    for question, answer in (("read the same to you?", "y\n"),
                             ("file with your records: ", f"{rows}\n"), ("uploads and reports [", "state\n"),
                             ("Declared size [120]: ", "\n"), ("smaller is more private [8]: ", "6\n"),
                             ("δ, the slack on that [1e-05]: ", "\n"), ("Allow no server with another key", "y\n"),
                             ("Take part? [y/N]: ", "y\n")):
        second.expect(question, answer)
    second.expect("the run is finished")
    assert second.end() == 0 and coordinator.end("server") == 0
    assert coordinator.adapter() and list((hospital / "state").glob("*/privacy.json"))
    policy = Policy.read(home / "config" / "fedlora" / "policy.toml")
    assert policy.dataset_at(str(rows.parent / rows.name)).epsilon == 6.0 and policy.server_fingerprints


def test_a_server_that_was_started_otherwise_than_its_kit_says_is_refused(coordinator, tmp_path):
    rows, home = write_rows(tmp_path / "records" / "notes.jsonl", 0), coordinator.home("north")
    words = ("join", tmp_path / "kit.toml", "--model", coordinator.checkpoint, "--threads", 1, "--device", "cpu",
             "--yes", "--data", rows, "--epsilon", 8, "--declared-size", 120, "--tls", tmp_path / "north", "--name",
             "north", "--write", tmp_path / "client.toml", "--simulated-ledger", home)
    log = tmp_path / "north.log"
    assert start("client", *words, log=log, home=home).wait(240) == 1
    assert server(["pki", "sign", str(tmp_path / "north" / "request.csr"), "--out",
                   str(tmp_path / "north" / "certificate.pem")]) == 0
    coordinator.server(*coordinator.options, "--min-clients", 1, "--local-steps", 3, "--lr", 0.001)
    assert start("client", *words, log=log, home=home).wait(240) == 4, log.read_text()
    assert "local-steps is 3, and the kit says 2" in log.read_text() and "lr is" not in log.read_text()
    assert start("client", "--config", tmp_path / "client.toml", log=log, home=home).wait(240) == 4
    coordinator.wait_for("server", "north declined")
