"""Secure sums of real processes over TLS: clients that drop out in each phase, and servers that are killed in each."""

import json
import signal
from itertools import filterfalse

import pytest
from safetensors.numpy import load_file as load_state

from fedlora.config import SimulationConfig, read_config
from fedlora.plan.limits import sum_threshold
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, populate
from fedlora_simulations.simulated_run import simulate
from fedlora_strategies import strategy_class
from tests.covering import few
from tests.federation import STRATEGIES
from tests.processes import write_rows
from tests.secure_deployments import CLIENT_POINTS, SERVER_POINTS, SecureDeployment


@pytest.fixture
def deploy(tmp_path, checkpoint):
    made = []

    def start(members, *options):
        made.append(SecureDeployment(tmp_path, checkpoint("bert"), members, *options))
        return made[-1]

    yield start
    for deployment in made:
        deployment.__exit__()


LINEAR = [name for name in STRATEGIES if strategy_class(name).recipe.reduction.linear]
"""The strategies that sum securely. The others are refused by name."""

OPTIONS = {"randlora": ("--family-options", "gamma=0")}


@pytest.mark.parametrize(("strategy", "members", "hold_out"), few(
    ("fedavg-lora", 3, 0.25), *((strategy, 6, 0.0) for strategy in LINEAR)))
def test_a_run_of_masked_sums_ends_with_the_bits_of_its_simulation(deploy, tmp_path, strategy, members, hold_out):
    same = ("--rounds", "3", "--hold-out", str(hold_out), *OPTIONS.get(strategy, ()))
    run = deploy(members, *same, "--seed", 5)
    run.server(*run.command, "--strategy", strategy)
    for name in run.names:
        run.client(name, tmp_path / "rows" / name / "rows.jsonl", "--tls", tmp_path / "tls" / name, seed=5)
    assert run.end("server") == 0, run.log("server")
    data, simulated_in = tmp_path / "simulated", tmp_path / "simulated run"
    simulated_in.mkdir()
    for number, name in enumerate(run.names):
        write_rows(data / f"{name}.jsonl", number)
    options = read_config(SimulationConfig, [
        "--secure-aggregation", f"--model={run.checkpoint}", f"--data={data}", "--partition=files", "--threads=1",
        "--device=cpu", "--precision=fp32", "--rank=2", "--batch-size=8", "--max-length=16", "--targets=query",
        "--labels=routine,urgent", *same])
    simulate(options, Method.parse(strategy), 5, find_model(options), populate(options, 5), out=simulated_in)
    simulated, deployed = (load_state(folder / "checkpoint.safetensors") for folder in (simulated_in, run.out))
    assert simulated.keys() == deployed.keys() and simulated
    for name, tensor in simulated.items():
        assert tensor.tobytes() == deployed[name].tobytes(), f"{name} differs"
    records = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
               for folder in (simulated_in, run.out)]
    assert [record["evaluation"] for record in records[0]] == [record["evaluation"] for record in records[1]]
    assert ("held_out_accuracy/drawn" in records[1][-1]["evaluation"]) == bool(hold_out)
    for folder in (simulated_in, run.out):
        kept = json.loads((folder / "run.json").read_text())["step"]
        assert kept["optimizer"]["name"] == "adam", "what a resumed run must have again is the run's own step"


DROPOUTS = tuple(dict.fromkeys((
    (6, "closing"), (6, "training reveals"),
    *((members, " ".join([phase] * gone)) for members in (3, 6) for phase in CLIENT_POINTS
      for gone in range(members - sum_threshold(members) + 2)),
    (6, "packages training"), (6, "training closing"), (6, "upload reveals"), (9, "training closing"),
    (20, "packages training upload closing reveals reveals"),
    (20, "packages training training upload closing reveals reveals"))))
"""Number of clients, and the phases in which some of them are killed, one in each."""


def opens(case):
    members, phases = case
    return len(phases.split()) <= members - sum_threshold(members)


@pytest.mark.parametrize(("members", "phases"), few(*filter(opens, DROPOUTS)))
def test_a_sum_is_opened_though_members_drop_out(deploy, members, phases):
    run = deploy(members, "--rounds", 1, "--round-timeout", 60)
    run.serve()
    run.start_members(phases)
    assert run.end("server") == 0, run.log("server")
    for name in run.alive:
        assert run.end(name) == 0, run.log(name)
    assert run.check() == {(1, 0): run.uploading}


@pytest.mark.parametrize(("members", "phases"), few(*filterfalse(opens, DROPOUTS)))
def test_a_sum_that_too_many_leave_stays_closed_and_charged(deploy, members, phases):
    run = deploy(members, "--rounds", 1, "--round-timeout", 60, "--wait-timeout", 5)
    run.serve()
    run.start_members(phases)
    assert run.end("server") == 1, run.log("server")
    assert run.check() == {}
    begun = {*phases.split()} != {"packages"}
    for name in run.alive:
        assert run.end(name) in (0, 1, 3), run.log(name)
        assert len(run.charges(name)) == begun, "what was trained stays charged"
        assert ("revealed no share" in run.log(name)) == (begun and "reveals" not in phases)
    assert ("unopened" in run.log("server")) == begun


@pytest.mark.parametrize(("members", "point", "phases"), few(
    (6, "while shares come", "closing"), *((members, point, "") for members in (3, 6) for point in SERVER_POINTS),
    (6, "once the cohort is stored", "packages"), (6, "while uploads come", "training"),
    (6, "once the sum is closed", "upload"), (6, "while clients sign", "reveals"),
    (20, "while shares come", "packages training upload closing reveals reveals")))
def test_a_server_that_is_killed_goes_on_in_the_same_phase_and_nobody_trains_twice(deploy, members, point, phases):
    run = deploy(members, "--rounds", 2)
    run.serve((point, 1))
    run.start_members(phases)
    assert run.end("server") == -signal.SIGKILL, run.log("server")
    run.serve()
    assert run.end("server") == 0, run.log("server")
    for name in run.alive:
        assert run.end(name) == 0, run.log(name)
        assert len(run.charges(name)) == 2, "nobody was charged twice for a round"
    assert run.check() == {(1, 0): run.uploading, (2, 0): run.alive}
    report = json.loads((run.out / "report.json").read_text())
    assert report["finished_rounds"] == 2
