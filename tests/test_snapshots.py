"""Tests with real processes whose owner's files are put back to an earlier state, or come from the last version."""

import hashlib
import json
import shutil

import pytest

from fedlora.config import ServerConfig, read_config
from fedlora.plan import ANCHOR_BYTES, PROTOCOL
from fedlora.privacy import DatasetPolicy, Ledger
from fedlora_server import checkpoint
from fedlora_server.anchors import Anchors
from fedlora_server.run_setup import find_model, prepare
from tests.processes import Deployment, write_rows

SMALL = ("--rank", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16)
PLENTY = 200
"""An ε so large that its noise is found at once."""


@pytest.fixture
def deployment(tmp_path, checkpoint):
    with Deployment(tmp_path, checkpoint("bert")) as deployment:
        yield deployment


class North:
    """A data holder with a real ledger, policy, witness and key, and a budget for several runs."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.home = deployment.home("north")
        self.data = write_rows(deployment.folder / "data" / "north.jsonl", 0)
        policy = self.home / "config" / "fedlora" / "policy.toml"
        policy.parent.mkdir(parents=True)
        policy.write_text(DatasetPolicy("north", str(self.data), 10_000.0, 1e-5).toml())

    def take_part(self, *arguments):
        """Take part in the present server's run; return the client's exit code."""
        self.deployment.client("north", self.data, "--epsilon", PLENTY, *arguments)
        return self.deployment.end("north")

    def run(self, name, *arguments):
        """Do a run of one round with a server of its own, to the report."""
        self.serve(name)
        assert self.take_part(*arguments) == 0, self.deployment.log("north")
        assert self.deployment.end("server") == 0, self.deployment.log("server")

    def serve(self, name):
        self.deployment.out = self.deployment.folder / name
        self.deployment.server("--min-clients", 1, "--rounds", 1, *SMALL)

    def copy(self):
        """Copy all of the owner's files, with the witness beside the data."""
        for kept in (self.home, self.data.parent):
            shutil.copytree(kept, self.deployment.folder / "copy" / kept.name)

    def restore(self):
        for kept in (self.home, self.data.parent):
            shutil.rmtree(kept)
            shutil.copytree(self.deployment.folder / "copy" / kept.name, kept)

    def ledger(self):
        return Ledger(self.home / "state" / "fedlora" / "ledger.sqlite")

    def charges(self):
        ledger = self.ledger()
        try:
            return len(ledger.charges())
        finally:
            ledger.close()

    def reports(self):
        """Return the reports of all runs, oldest first."""
        found = sorted((self.deployment.folder / "state" / "north").glob("*/privacy.json"),
                       key=lambda path: path.stat().st_mtime)
        return [json.loads(path.read_text()) for path in found]


def test_a_snapshot_of_all_that_an_owner_has_is_refused_when_it_is_put_back_until_the_owner_decides(deployment):
    """Each run has a server and a folder of its own. An update leaves after the snapshot and before it is put back."""
    north = North(deployment)
    north.run("first")
    north.copy()
    north.run("second")
    assert north.charges() == 2
    north.restore()
    assert north.charges() == 1, "what left since is forgotten"

    north.serve("third")
    assert north.take_part() == 4
    log = deployment.log("north")
    assert "the server keeps its anchor" in log and "--new-ledger" in log and "Traceback" not in log
    assert "north declined: the client's policy does not allow this [policy]" in deployment.log("server")
    assert north.charges() == 1, "nothing is charged, nor read"

    assert north.take_part("--new-ledger") == 0, deployment.log("north")
    assert deployment.end("server") == 0
    ledger = north.ledger()
    [mark] = ledger.marks()
    assert mark["ledger_id"] == ledger.ledger_id and not ledger.created_anew
    ledger.close()
    assert [report["lifetime"]["new_ledger"] is not None for report in north.reports()] == [False, False, True]

    for report in north.reports():
        [item] = [item for item in report["left_without_noise"] if "anchor" in item["what"]]
        assert item["what"] == f"sealed anchor, {ANCHOR_BYTES} bytes in each upload"
    anchors = Anchors(deployment.home("server") / "state" / "fedlora" / "anchors.sqlite")
    ledger = north.ledger()
    assert ledger.check_anchor(anchors.newest("north")), "the last upload's"
    ledger.close()
    anchors.close()


def test_a_simulated_ledger_sends_no_anchor_and_says_so(deployment):
    data = write_rows(deployment.folder / "data" / "north.jsonl", 0)
    deployment.server("--min-clients", 1, "--rounds", 1, *SMALL)
    deployment.client("north", data, "--epsilon", PLENTY, seed=5)
    assert deployment.end("north") == deployment.end("server") == 0, deployment.log("north")
    assert not (deployment.home("server") / "state").exists()
    [report] = (deployment.folder / "state" / "north").glob("*/privacy.json")
    assert not any("anchor" in item["what"] for item in json.loads(report.read_text())["left_without_noise"])


def test_a_run_that_the_version_before_began_is_taken_up_with_the_plan_that_its_clients_know(deployment):
    """The run's folder states the earlier protocol, and so does the plan whose hash identifies the run to a client."""
    north = North(deployment)
    asked = ["--model", deployment.checkpoint, "--address", deployment.address, "--labels", "routine,urgent",
             "--min-clients", 1, "--rounds", 2, *SMALL]
    options = read_config(ServerConfig, list(map(str, asked)))
    federation = prepare(options, options.strategy, find_model(options), options.labels, options.seed,
                         protocol=PROTOCOL - 1)
    deployment.out.mkdir()
    checkpoint.begin(deployment.out, vars(options), federation.plan, {})
    deployment.resume()
    assert north.take_part() == 0, deployment.log("north")
    assert deployment.end("server") == 0, deployment.log("server")
    plan = json.loads((deployment.out / "run.json").read_text())["plan"]
    assert plan["protocol"] == PROTOCOL - 1
    ledger = north.ledger()
    assert [(charge.round, charge.state) for charge in ledger.charges()] == [(1, "released"), (2, "released")]
    known = ledger.terms("north", plan["run_id"]).plan_sha256
    ledger.close()
    assert known == hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
