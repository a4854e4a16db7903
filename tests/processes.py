"""Real fedlora-server and fedlora-client processes over loopback, with a tiny model, for tests from end to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PATIENCE = 4
"""Time limits end tests that hang; machines under load are slower than those on which the limits were chosen."""

WORDS = ("fever", "cough", "pain", "calm", "rest", "acute", "mild", "now", "since", "denies")


def write_rows(file: Path, seed: int, rows: int = 120, labels: tuple[str, ...] = ("routine", "urgent")) -> Path:
    """Rows whose label can be learned from their words."""
    rng = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for _ in range(rows):
            words = rng.choice(WORDS, 6)
            label = labels[int("acute" in words)]
            out.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: str, *arguments: object, log: Path, seed: int | None = None,
          home: Path | None = None) -> subprocess.Popen:
    """Start fedlora-<command>; a client in which importing Flower fails. `seed` makes its noise predictable.

    `home` is where the user's ledger, policy and key are.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    if home is not None:
        environment |= {"XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")}
    if seed is not None:
        environment["FEDLORA_INSECURE_NOISE_SEED"] = str(seed)
    block = "sys.modules['flwr'] = None; " if command == "client" else ""
    code = f"import sys; {block}from fedlora_{command}.cli import main; sys.exit(main(sys.argv[1:]))"
    with log.open("w") as out:
        return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=out, stderr=out,
                                env=environment)


class Deployment:
    """One server and clients that are killed at the end, whatever happens."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen] = {}
        self.out = folder / "run"

    def server(self, *arguments: object) -> subprocess.Popen:
        process = start("server", "--model", self.checkpoint, "--address", self.address, "--out", self.out,
                        *arguments, log=self.folder / "server.log")
        self.processes["server"] = process
        return process

    def client(self, name: str, data: Path, *arguments: object, seed: int | None = None) -> subprocess.Popen:
        if seed is not None:
            arguments = (*arguments, "--simulated-ledger", self.home(name))
        process = start("client", "--data", data, "--name", name, "--server", self.address, "--model", self.checkpoint,
                        "--state", self.folder / "state" / name, "--threads", 1, "--device", "cpu",
                        "--precision", "fp32", *arguments, log=self.folder / f"{name}.log", seed=seed,
                        home=self.home(name))
        self.processes[name] = process
        return process

    def home(self, name: str) -> Path:
        """Each client stands for a machine of its own: its user's files are below this."""
        return self.folder / "home" / name

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, text: str, timeout_s: float = 90.0) -> None:
        """Block until the log of a process holds `text`."""
        deadline = time.monotonic() + PATIENCE * timeout_s
        while text not in self.log(name):
            assert self.processes[name].poll() is None, f"{name} ended without {text!r}:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} did not say {text!r}:\n{self.log(name)}"
            time.sleep(0.05)

    def end(self, name: str, timeout_s: float = 120.0) -> int:
        """The exit code of a process."""
        try:
            return self.processes[name].wait(PATIENCE * timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end:\n{self.log(name)}") from None

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
