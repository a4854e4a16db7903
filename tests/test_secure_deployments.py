"""Secure sums of real processes over TLS: clients that drop out in each phase, and servers that are killed in each."""

import json
import signal

import pytest
from safetensors.numpy import load_file as load_state

from fedlora.config import SimulationConfig, read_config
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, populate
from fedlora_simulations.simulated_run import simulate
from tests.covering import few
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


LINEAR = ("bone", "dora-frozen-a", "dora-magnitudes", "fed-sb", "fedavg-lora", "fedsvd", "fedsvd-refresh", "ffa-lora",
          "flylora", "loldu", "pissa", "randlora", "rolora", "salt", "switch-lora")
"""The strategies that sum securely and train under privacy."""

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


@pytest.mark.parametrize(("members", "phase", "gone"), few(
    (6, "closing", 1), (3, "training", 0), *((6, phase, 1) for phase in CLIENT_POINTS if phase != "closing")))
def test_a_sum_is_opened_though_members_drop_out(deploy, members, phase, gone):
    run = deploy(members, "--rounds", 1, "--round-timeout", 60)
    run.serve()
    for number, name in enumerate(run.names):
        run.member(name, (phase, 1) if number < gone else None)
    assert run.end("server") == 0, run.log("server")
    for name in run.names[:gone]:
        assert run.end(name) == -signal.SIGKILL, run.log(name)
    for name in run.names[gone:]:
        assert run.end(name) == 0, run.log(name)
    [(_, names)] = run.check().items()
    inside = run.names if phase in ("closing", "reveals") else run.names[gone:]
    assert list(names) == inside


@pytest.mark.parametrize(("members", "phase", "gone"), few(
    (6, "reveals", 2), (3, "training", 1), (6, "closing", 2), (6, "training", 2), (6, "upload", 2), (3, "reveals", 1)))
def test_a_sum_that_too_many_leave_stays_closed_and_charged(deploy, members, phase, gone):
    run = deploy(members, "--rounds", 1, "--round-timeout", 60, "--wait-timeout", 5)
    run.serve()
    for number, name in enumerate(run.names):
        run.member(name, (phase, 1) if number < gone else None)
    assert run.end("server") == 1, run.log("server")
    assert run.check() == {}
    for name in run.names[gone:]:
        assert run.end(name) in (0, 1, 3), run.log(name)
        assert run.charges(name), "what was trained stays charged"
        assert "revealed no share" in run.log(name) or phase == "reveals"
    assert "unopened" in run.log("server")


@pytest.mark.parametrize(("members", "point"), few(
    (3, "once the sum is closed"), *((3, point) for point in SERVER_POINTS if point != "once the sum is closed"),
    (6, "while shares come")))
def test_a_server_that_is_killed_goes_on_in_the_same_phase_and_nobody_trains_twice(deploy, members, point):
    run = deploy(members, "--rounds", 2)
    run.serve((point, 1))
    for name in run.names:
        run.member(name)
    assert run.end("server") == -signal.SIGKILL, run.log("server")
    run.serve()
    assert run.end("server") == 0, run.log("server")
    for name in run.names:
        assert run.end(name) == 0, run.log(name)
    opened = run.check()
    assert {number for number, _ in opened} == {1, 2}
    assert all(list(names) == run.names for names in opened.values())
    if point != "before the cohort is stored":
        assert all(len(run.charges(name)) == 2 for name in run.names), "nobody was charged twice for a round"
    report = json.loads((run.out / "report.json").read_text())
    assert report["finished_rounds"] == 2
