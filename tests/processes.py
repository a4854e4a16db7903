"""Real fedlora-server and fedlora-client processes on this machine, with a tiny model, for end-to-end tests."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import load_file

import fedlora_simulations.processes as simulated
from fedlora.privacy.accounting import nominal_size

PATIENCE = 4
"""Factor on time limits, which only end tests that hang: a machine under load is slower than usual."""

WORDS = ("fever", "cough", "pain", "calm", "rest", "acute", "mild", "now", "since", "denies")


def write_rows(file: Path, seed: int, rows: int = 120, labels: tuple[str, ...] = ("routine", "urgent")) -> Path:
    """Write rows whose label can be learned from their words, and return the file."""
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


class Process(Protocol):
    """The part of `subprocess.Popen` that tests use."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int) -> None: ...

    def kill(self) -> None: ...


NOT_INSTALLED = ("flwr", "datasets", "matplotlib", "grpc_health")
"""Packages that requirements-client.txt leaves out: a client has to do without them."""

NOT_CLIENTS = (*NOT_INSTALLED, "fedlora_server", "fedlora_strategies", "fedlora_simulations")
"""Packages that a client must not find in memory."""

WARM = "tests.warm"
FORKS = multiprocessing.get_context("forkserver")
simulated.PRELOADED = [WARM]  # a process has only one fork server, made by whoever needs it first
FORKS.set_forkserver_preload(simulated.PRELOADED)
_ensure_running = forkserver.ensure_running


def _ensure_running_here() -> None:
    """Start the fork server where it finds what it is to preload, wherever a test has gone.

    Before Python 3.13 it looks in its current folder and in what is installed, and leaves out in silence what it does
    not find (https://github.com/python/cpython/issues/117378). Each process would then import all by itself.
    """
    with contextlib.chdir(Path(__file__).parents[1]):
        _ensure_running()


forkserver._forkserver.ensure_running = _ensure_running_here  # type: ignore[attr-defined]


class Forked:
    """A fedlora-<command> process, forked from a process that has only imported the libraries.

    Args:
        command: "server", "client" or "simulate".
        arguments: the command's arguments.
        log: file for its stdout and stderr.
        environment: more variables.
        folder: its current folder.
        terminal: whether the log is a terminal's file, from which it reads too.
    """

    def __init__(self, command: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str],
                 folder: Path, *, terminal: bool = False) -> None:
        if not terminal:
            log.write_bytes(b"")  # the file must exist for tests that wait for a word in it
        self._process = FORKS.Process(target=_run, args=(command, arguments, log, environment, folder, terminal),
                                      daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("fedlora", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(command: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str],
         folder: Path | None = None, terminal: bool = False) -> None:
    assert WARM in sys.modules, f"the fork server has not imported {WARM}, so this process would import all by itself"
    if folder is not None:
        os.chdir(folder)
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if terminal:
        sys.stdin = log.open()
    os.environ.update(environment)
    if command == "client":
        for name in [name for name in sys.modules if name.partition(".")[0] in NOT_CLIENTS]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(NOT_INSTALLED))  # type: ignore[arg-type]
        from fedlora_client.cli import main
    elif command == "server":
        from fedlora_server.cli import main
    elif command == "adapter":
        from fedlora_adapter.cli import main
    else:
        from fedlora_simulations.cli import main
    sys.exit(main(arguments))


def start(command: str, *arguments: object, log: Path, seed: int | None = None, home: Path | None = None,
          fresh: bool = False, folder: Path | None = None) -> Process:
    """Start fedlora-<command>. In a client, importing Flower or anything else in `NOT_INSTALLED` fails.

    Args:
        command: "server", "client", "simulate" or "adapter".
        *arguments: the command's arguments.
        log: file for its stdout and stderr.
        seed: makes a client's noise predictable.
        home: folder of the user's ledger, policy and key, or of what a server keeps for its clients.
        folder: the process's current folder; None for this one's.
        fresh: run the installed command, as a user does, in place of a fork, which saves the time of its imports.
    """
    environment = {"COLUMNS": "200"}
    if home is not None:
        environment |= {"XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")}
    if seed is not None:
        environment["FEDLORA_INSECURE_NOISE_SEED"] = str(seed)
    words = [str(argument) for argument in arguments]
    if not fresh:
        return Forked(command, words, log, environment, folder or Path.cwd())
    with log.open("w") as out:
        return subprocess.Popen([Path(sys.executable).parent / f"fedlora-{command}", *words], stdout=out, stderr=out,
                                cwd=folder, env=os.environ | environment)


class Deployment:
    """One server and its clients, all killed at the end of the test.

    Args:
        fresh: see `start`.
    """

    def __init__(self, folder: Path, checkpoint: Path, *, fresh: bool = False) -> None:
        self.folder, self.checkpoint, self.fresh = folder, checkpoint, fresh
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, Process] = {}
        self.out = folder / "run"

    def server(self, *arguments: object) -> Process:
        return self._server("--model", self.checkpoint, "--address", self.address, "--out", self.out, *arguments)

    def resume(self, *arguments: object) -> Process:
        """Start a server that resumes the run of the one before, with no other options than these."""
        return self._server("--resume", self.out, *arguments)

    def _server(self, *arguments: object) -> Process:
        process = start("server", *arguments, log=self.folder / "server.log", home=self.home("server"),
                        fresh=self.fresh)
        self.processes["server"] = process
        return process

    def client(self, name: str, data: Path, *arguments: object, seed: int | None = None,
               defaults: bool = True) -> Process:
        """Start a client. With `defaults` it declares the size and labels of rows from `write_rows`."""
        size = nominal_size(data.read_bytes().count(b"\n") or 1) if data.is_file() else 120
        if seed is not None:
            arguments = (*arguments, "--simulated-ledger", self.home(name))
        for flag, *value in (("--yes",), ("--declared-size", size), ("--labels", "routine,urgent")):
            if defaults and flag not in arguments:
                arguments = (*arguments, flag, *value)
        process = start("client", "--data", data, "--name", name, "--server", self.address, "--model", self.checkpoint,
                        "--state", self.folder / "state" / name, "--threads", 1, "--device", "cpu",
                        "--precision", "fp32", *arguments, log=self.folder / f"{name}.log", seed=seed,
                        home=self.home(name), fresh=self.fresh)
        self.processes[name] = process
        return process

    def home(self, name: str) -> Path:
        """Return the folder of a client's user files. Each client has its own, as if on its own machine."""
        return self.folder / "home" / name

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def adapter(self) -> dict[str, bytes]:
        """Return the bytes of each tensor of the run's adapter, by name."""
        tensors = load_file(self.out / "adapter" / "adapter_model.safetensors")
        return {name: tensor.tobytes() for name, tensor in tensors.items()}

    def wait_for(self, name: str, text: str, timeout_s: float = 90.0) -> None:
        """Wait until the log of a process contains `text`."""
        deadline = time.monotonic() + PATIENCE * timeout_s
        while text not in self.log(name):
            assert self.processes[name].poll() is None, f"{name} ended without {text!r}:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} did not say {text!r}:\n{self.log(name)}"
            time.sleep(0.05)

    def end(self, name: str, timeout_s: float = 120.0) -> int:
        """Wait until a process ends, and return its exit code."""
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
