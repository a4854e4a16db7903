"""Tests of old files: ledger, policy, reports and runs of the version with protocol 4 are read, checked and continued.

Real processes of that version wrote the files, by `fixtures/protocol-4/make.py`.
"""

import json
import shutil
from pathlib import Path

import pytest

from fedlora.privacy import Ledger, Policy, RunTerms
from fedlora.privacy.ledger.witness import read_witness, witness_file
from fedlora_client.cli import main
from tests.processes import Deployment

WRITTEN = Path(__file__).parent / "fixtures" / "protocol-4"
FIGURES = json.loads((WRITTEN / "figures.json").read_text())
AGREED = ("--yes",)
"""Option of a client with a real ledger that has no terminal to ask."""


@pytest.fixture
def left(tmp_path):
    """Copy the files to a new place, and rewrite the paths in them, as an owner would who moves them."""
    here = shutil.copytree(WRITTEN, tmp_path / "left")
    for file in (here / "home" / "config" / "fedlora" / "policy.toml", here / "run" / "run.json"):
        file.write_text(file.read_text().replace("@HERE@", str(here)))
    for file in (here / "home" / "state" / "fedlora").iterdir():
        file.chmod(0o600)  # git keeps no modes
    return here


@pytest.fixture
def ledger(left):
    opened = Ledger(left / "home" / "state" / "fedlora" / "ledger.sqlite")
    yield opened
    opened.close()


def policy_of(left):
    return Policy.read(left / "home" / "config" / "fedlora" / "policy.toml")


def declare(ledger, left, name):
    known = policy_of(left).datasets[name]
    ledger.declare(name, epsilon=known.epsilon, delta=known.delta, unit=known.unit, distinct=known.distinct,
                   witness=witness_file(left / "data", name))


@pytest.mark.parametrize("name", FIGURES)
def test_the_ledger_says_of_each_data_set_what_it_said_then(ledger, left, name):
    then, lifetime = FIGURES[name], ledger.lifetime(name)
    assert (lifetime.epsilon, lifetime.closed_by is not None) == (then["epsilon"], then["closed"])
    assert lifetime.spent == pytest.approx(then["spent"], abs=1e-6)
    assert lifetime.remaining == pytest.approx(then["remaining"], abs=1e-6)
    assert [[c.round, c.attempt, c.state] for c in ledger.charges(name)] == then["charges"]
    assert {run: ledger.epsilon(name, run) for run in then["runs"]} == pytest.approx(then["runs"], abs=1e-6)


@pytest.mark.parametrize("name", FIGURES)
def test_witness_and_policy_fit_the_ledger(ledger, left, name):
    assert policy_of(left).dataset_at(str(left / "data" / f"{name}.jsonl")).id == name
    events = read_witness(witness_file(left / "data", name)).rows
    assert events > 0
    ledger.check_folder(left / "data")
    declare(ledger, left, name)
    assert ledger.marks() == () and len(ledger.fingerprint_key()) == 32
    [*_, declared] = ledger.lifetime(name).declared
    assert declared.epsilon == FIGURES[name]["epsilon"]


def test_a_further_run_is_charged_on_top(ledger, left):
    declare(ledger, left, "open")
    before = ledger.lifetime("open")
    ledger.begin_run("open", RunTerms("f" * 16, "a" * 64, "row", 120, 0.1, 4.0, 1e-5, 1.0, {"adapter": 1.0}, 2, 2))
    reservation = ledger.reserve("open", "f" * 16, 1, 0)
    reservation.begin()
    reservation.stored("0" * 64)
    reservation.released()
    after = ledger.lifetime("open")
    assert before.spent == pytest.approx(FIGURES["open"]["spent"], abs=1e-6) and after.spent > before.spent
    assert after.remaining < before.remaining
    assert len(ledger.charges("open")) == len(FIGURES["open"]["charges"]) + 1
    assert read_witness(witness_file(left / "data", "open")).ledger_id == ledger.ledger_id


def test_a_closed_budget_stays_closed(ledger, left):
    declare(ledger, left, "closed")
    terms = RunTerms("f" * 16, "a" * 64, "row", 120, 0.01, 50.0, 1e-6, 1.0, {"adapter": 1.0}, 1, 1)
    assert not ledger.fits("closed", terms)


@pytest.mark.parametrize("name", ["open", "closed", "rounded"])
def test_a_privacy_report_verifies(name, capsys):
    for option, code in (([], 3), (["--any-key"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(WRITTEN / "reports" / f"{name}.json"), *option])
        assert ended.value.code == code, capsys.readouterr()
    report = json.loads((WRITTEN / "reports" / f"{name}.json").read_text())
    assert (report["lifetime"]["closed_by"] is None) == (name == "open")
    assert report["mechanism"]["rounding_cover"] == (0.01 if name == "rounded" else 0.0)


class Moved(Deployment):
    """Start a deployment on the server's run and the clients' user files as they were left."""

    def home(self, name):
        return self.folder / "home"


def test_a_run_that_was_stopped_goes_on_to_its_end_with_its_clients(left):
    """Both clients have trained for round 2. Neither the stored updates nor round 1 is charged again."""
    stored = {name: next((left / "state" / name).glob("*/upload.safetensors")) for name in ("north", "south")}
    with Moved(left, left / "model") as deployment:
        deployment.resume("--address", deployment.address)
        for name in stored:
            deployment.client(name, left / "data" / f"{name}.jsonl", "--declared-size", 600, *AGREED)
        assert deployment.end("server") == 0, deployment.log("server")
        assert deployment.end("north") == deployment.end("south") == 0, deployment.log("north")
    assert "goes on after round 1 of 3" in deployment.log("server")
    report = json.loads((left / "run" / "report.json").read_text())
    assert (report["ended"], report["resumed_after_rounds"]) == ("finished", [1])
    ledger = Ledger(left / "home" / "state" / "fedlora" / "ledger.sqlite")
    try:
        for name in stored:
            assert [[c.round, c.attempt, c.state] for c in ledger.charges(name)] == [
                *FIGURES[name]["charges"], [3, 0, "released"]]
            [run] = FIGURES[name]["runs"]
            assert ledger.epsilon(name, run) > FIGURES[name]["runs"][run]
    finally:
        ledger.close()
