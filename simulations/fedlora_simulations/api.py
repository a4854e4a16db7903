"""Simulations from Python: the code of the command fedlora-simulate, in the calling process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import SimulationConfig
from fedlora.config.parser import given_in_python

from .cli import quiet_clients, set_environment

if TYPE_CHECKING:  # the environment is set before these are imported
    from rich.console import Console

    from .outcome import Simulation


def simulate(config: SimulationConfig | Path | str | None = None, /, *, console: Console | None = None,
             **options: object) -> Simulation:
    """Simulate federated runs: every method on the same data split, one run for each seed.

    The options are those of `fedlora-simulate --help`, with underscores: `simulate(strategy="fedsvd,fed-sb",
    data="train", eval_data="val.jsonl", rounds=5, seeds=(0, 1))`. Lists can be given as text with commas too.

    Args:
        config: the options as a config, or a TOML file of them; None for the defaults.
        console: shows what happens; None for stderr.
        **options: options by name, which override `config`.

    Returns:
        The results. Their files are in `out`; if it is not given, in runs/TIME-simulation.

    Raises:
        ValueError: an option is wrong, the options do not fit the model, the data or each other, or a run ended early.
        Refused: the clients' privacy limits do not allow a plan.
        WorkerLost: a worker process ended during training.
        OSError: a file cannot be read or written.
    """
    read = SimulationConfig(**given_in_python(SimulationConfig, config, options, "simulate()"))
    if read.dry_run:
        raise ValueError("simulate(): dry_run works only with the command fedlora-simulate; leave it out")
    set_environment()
    from rich.console import Console

    from .running import run

    with quiet_clients():
        done = run(read, console, Console(file=io.StringIO()))
    assert done is not None, "only a dry run has no results"
    return done
