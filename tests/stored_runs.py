"""Run folders as a server leaves them when it is killed after its second round, made without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import ServerConfig, read_config
from fedlora.plan import RunPlan
from fedlora_server import checkpoint
from fedlora_server.observer import RoundRecord
from fedlora_server.run_setup import find_model, prepare
from tests.fedlora.test_adapters import random_state

FIGURES = {"accuracy": 0.75, "accuracy/low": 0.6, "accuracy/high": 0.86, "accuracy/majority": 0.5, "loss": 0.625,
           "recall/urgent": 0.7, "recall/urgent/low": 0.55, "recall/urgent/high": 0.81, "count": 40}
CLIENTS = ("north", "south")
SIGMAS = {"north": 1.25, "south": 1.5}


@dataclass(frozen=True)
class Made:
    """A run's folder, its plan, and its base model's folder."""

    folder: Path
    plan: RunPlan
    base: Path


def stored(folder: Path, base: Path, *arguments: object, rounds: Sequence[int] = (1, 2)) -> Made:
    """Write a run's folder with random adapter values, large enough to change every prediction.

    Args:
        folder: the run's folder, made if it does not exist.
        base: the base model's folder.
        *arguments: options of fedlora-server.
        rounds: the finished rounds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = read_config(ServerConfig, [f"--model={base}", "--rank=2", "--max-length=24", *map(str, arguments)])
    federation = prepare(options, options.strategy, find_model(options), options.labels or (), options.seed)
    plan = federation.plan
    checkpoint.begin(folder, vars(options), plan, {}, (), federation.strategy.recipe.described())
    for number in rounds:
        said = {name: {"steps": plan.local_steps} | ({"noise_multiplier": SIGMAS[name], "delta": 1e-5} if plan.private
                                                     else {"num_examples": 40}) for name in CLIENTS}
        checkpoint.note(folder, RoundRecord(number, cohort=CLIENTS, uploaded=CLIENTS, disclosed=said,
                                            evaluation=FIGURES if plan.labels else {}))
    checkpoint.save(folder, plan.run_id, rounds[-1] if rounds else 0, random_state(federation.adapted), {})
    return Made(folder, plan, base)
