"""Time to start: --help of every command, and from the loaded model to the first training step.

Each is the CPU time of a new process, which other work on the machine disturbs least. Importing PyTorch and
transformers comes before the model is loaded; that part is shown beside the rest.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from ..fresh import in_fresh_process
from ..measure import RATIO, Figure, Row, Settings, Value

COMMANDS = {"fedlora-client": ("fedlora_client", ()), "fedlora-client budget": ("fedlora_client", ("budget",)),
            "fedlora-server": ("fedlora_server", ()), "fedlora-simulate": ("fedlora_simulations", ())}


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each command, and one for the start of training."""
    for name, (package, words) in COMMANDS.items():
        bare, helped = [], []
        for _ in range(settings.repeats(7)):
            bare.append(_child_cpu_s("-c", "pass"))
            helped.append(_child_cpu_s("-m", f"{package}.cli", *words, "--help"))
        yield Row(f"{name} --help", {
            "÷ bare Python": Value.of([a / b for a, b in zip(helped, bare, strict=True)], RATIO, better="lower"),
            "CPU": Value.of(helped, "s", better="lower", target=0.3)})
    arguments = {"data": str(settings.data), "model": settings.model, "device": settings.device,
                 "threads": settings.threads or 1, "batch": 4 if settings.quick else 160}
    begun = [in_fresh_process(f"{__name__}:first_step", **arguments) for _ in range(settings.repeats(3))]
    yield Row("from the loaded model to the first step", {
        "wall": Value.of([one["wall"] for one in begun], "s", better="lower", target=3.0),
        "CPU": Value.of([one["cpu"] for one in begun], "s", better="lower"),
        "CPU ÷ until the model was loaded": Value.of([one["cpu"] / one["before"] for one in begun], RATIO,
                                                     better="lower"),
        "CPU until the model was loaded": Value.of([one["before"] for one in begun], "s", better="lower")})


def _child_cpu_s(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class _Begun(Exception):
    """Raised in place of the first training step."""


def first_step(data: str, model: str, device: str, threads: int, batch: int) -> dict[str, float]:
    """Measure all that server and client do in this process up to the first step of one private client.

    Returns:
        Seconds: "wall" and "cpu" since the model was loaded, and "before", the CPU time until then.
    """
    from fedlora import models
    from fedlora.config import SimulationConfig, read_config
    from fedlora.training import Trainer
    from fedlora_server.run_setup import find_model
    from fedlora_simulations.population import Method, populate
    from fedlora_simulations.simulated_run import simulate

    options = read_config(SimulationConfig, [
        f"--data={data}", f"--model={model}", f"--device={device}", f"--threads={threads}", "--clients=1",
        f"--batch-size={batch}", "--max-length=64", "--precision=fp32"])
    base, population = find_model(options), populate(options, 0)
    loaded: list[tuple[float, float]] = []
    load = models.load

    def watched(*args: Any, **kwargs: Any) -> models.LoadedModel:
        result = load(*args, **kwargs)
        loaded.append((time.monotonic(), time.process_time()))
        return result

    def begin(*args: Any, **kwargs: Any) -> None:
        raise _Begun

    with patch.object(models, "load", watched), patch.object(Trainer, "train", begin):
        try:
            simulate(options, Method("fed-sb", None), 0, base, population)
        except _Begun:
            wall, cpu = loaded[-1]
            return {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu, "before": cpu}
    raise RuntimeError("the run ended without a training step")


FIGURE = Figure(10, measure)
