"""Tests of `flwr run` on a real SuperLink with SuperNodes: Flower's processes run FedLoRA's strategies and client.

A round is slow there (README.md): Flower starts a process for each message, which loads everything anew.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from fedlora.config import ServerConfig, SimulationConfig, flag, options_of, read_config
from fedlora.privacy import INSECURE_SEED_VARIABLE, Ledger
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, populate
from fedlora_simulations.simulated_run import simulate
from tests.processes import PATIENCE, free_port, write_rows

APP = Path(__file__).parent.parent / "simulations" / "flower_app"
EXAMPLE = Path(__file__).parent.parent / "examples" / "flower_app"
BINARIES = Path(sys.executable).parent
COMMANDS = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp")
MISSING = [name for name in COMMANDS if not (BINARIES / name).exists()]
SMALL = {"rank": 2, "rounds": 2, "local-steps": 2, "batch-size": 8, "max-length": 16}


class Flower:
    """A SuperLink and its SuperNodes. At the end it kills all their processes, which Flower spreads over sessions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: dict[str, subprocess.Popen] = {}
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text('[superlink]\ndefault = "test"\n[superlink.test]\n'
                                          f'address = "127.0.0.1:{self.port}"\ninsecure = true\n')
        self.environment = os.environ | {
            "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1",
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}

    def start(self, name: str, *command: object, **environment: str) -> None:
        with self.log_file(name).open("w") as log:
            self.processes[name] = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, cwd=self.folder,
                                                    env=self.environment | environment)

    def superlink(self) -> None:
        self.start("superlink", BINARIES / "flower-superlink", "--insecure", "--port", self.port)
        self.wait_until(lambda: "Uvicorn running" in self.log_file("superlink").read_text(), timeout_s=60)

    def supernode(self, name: str, seed: int, **config: object) -> None:
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in {"name": name, **config}.items())
        self.start(name, BINARIES / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
                   "--port", free_port(), "--node-config", values, **{INSECURE_SEED_VARIABLE: str(seed)})

    def run(self, app: Path, **config: object) -> None:
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        done = subprocess.run([BINARIES / "flwr", "run", app, "--run-config", values], cwd=self.folder, text=True,
                              env=self.environment, capture_output=True, timeout=PATIENCE * 60)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait_until(self, true: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + PATIENCE * timeout_s
        while not true():
            assert time.monotonic() < deadline, self.logs()
            assert all(process.poll() is None for process in self.processes.values()), self.logs()
            time.sleep(0.2)

    def log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def logs(self) -> str:
        return "\n".join(f"{name}:\n{self.log_file(name).read_text()[-4000:]}" for name in self.processes)

    def __enter__(self) -> "Flower":
        return self

    def __exit__(self, *exception: object) -> None:
        started = [psutil.Process(own.pid) for own in self.processes.values() if own.poll() is None]
        for process in [*started, *(child for one in started for child in one.children(recursive=True))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for own in self.processes.values():
            own.wait()


with_flower = pytest.mark.skipif(bool(MISSING),
                                 reason=f"Flower's commands are not beside this Python: {', '.join(MISSING)}")


@with_flower
def test_supernodes_and_simulation_end_with_the_same_adapter(tmp_path, checkpoint):
    model, nodes = checkpoint("bert"), ("hospital-0", "hospital-1")
    with Flower(tmp_path) as flower:
        flower.superlink()
        for seed, name in enumerate(nodes):
            data = write_rows(tmp_path / "data" / f"{name}.jsonl", seed)
            flower.supernode(name, 5, data=str(data), model=str(model), state=str(tmp_path / "state" / name),
                             threads=1, device="cpu", precision="fp32", labels="routine,urgent",
                             **{"simulated-ledger": str(tmp_path / name)})
        flower.run(APP, strategy="fedsvd", model=str(model), seed=5, out=str(tmp_path / "run"), **SMALL,
                   **{"min-clients": 2, "min-replies": 2})
        flower.wait_until((tmp_path / "run" / "report.json").exists, timeout_s=180)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["ended"] == "finished" and report["plan"]["labels"] == ["routine", "urgent"]
    assert report["disclosed"]["hospital-0"]["joined_with"]["label_names"] == ["routine", "urgent"]
    for name in nodes:  # the processes of all messages share one ledger and one report
        ledger = Ledger(tmp_path / name / "ledger.sqlite", simulated=True)
        assert [(charge.round, charge.state) for charge in ledger.charges()] == [(1, "released"), (2, "released")]
        ledger.close()
        [privacy] = (tmp_path / "state" / name).glob("*/privacy.json")
        assert "urgent" in privacy.read_text()
    options = read_config(SimulationConfig, [
        f"--model={model}", f"--data={tmp_path / 'data'}", "--partition=files", "--threads=1", "--device=cpu",
        "--precision=fp32", *(f"--{key}={value}" for key, value in SMALL.items())])
    (tmp_path / "simulated").mkdir()
    simulate(options, Method.parse("fedsvd"), 5, find_model(options), populate(options, 5), out=tmp_path / "simulated")
    simulated, deployed = (load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")
                           for folder in ("simulated", "run"))
    assert simulated.keys() == deployed.keys() and simulated
    assert [name for name in simulated if simulated[name].tobytes() != deployed[name].tobytes()] == []


@with_flower
def test_a_server_app_of_ones_own_runs_a_strategy_of_ours(tmp_path, checkpoint):
    """Runs examples/flower_app: a plain Flower run, with privacy, whose result is a PEFT adapter."""
    model = checkpoint("bert")
    with Flower(tmp_path) as flower:
        flower.superlink()
        data = write_rows(tmp_path / "data" / "hospital.jsonl", 0)
        flower.supernode("hospital", 5, data=str(data), model=str(model), state=str(tmp_path / "state"), threads=1,
                         device="cpu", precision="fp32", labels="routine,urgent",
                         **{"simulated-ledger": str(tmp_path / "hospital")})
        out = tmp_path / "adapter"
        flower.run(EXAMPLE, model=str(model), clients=1, rank=2, rounds=1, out=str(out))
        flower.wait_until((out / "adapter_model.safetensors").exists, timeout_s=120)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"].startswith("local:")
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_the_flower_app_knows_every_option_of_the_server_and_holds_no_code():
    config = tomllib.loads((APP / "pyproject.toml").read_text())
    of_the_command = {"resume", "address", "insecure", "tls", "dry-run", "log-format"}
    assert set(config["tool"]["flwr"]["app"]["config"]) == {
        flag(name) for name in options_of(ServerConfig)} - of_the_command
    assert [file.name for file in APP.rglob("*") if file.suffix in (".py", ".toml")] == ["pyproject.toml"]
