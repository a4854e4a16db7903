"""The results of a simulation, as `fedlora_simulations.simulate` returns them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from fedlora.plan import RunPlan
from fedlora_server.checkpoint import REPORT
from fedlora_server.observer import RoundRecord

from .comparison import Comparison, drawn, table
from .simulated_run import Simulated


@dataclass(frozen=True)
class SimulatedRun:
    """One method with one seed.

    Attributes:
        method: the method, as --strategy names it.
        seed: the seed.
        plan: what the clients were told.
        records: one for each finished round, and one for round 0 if the start was evaluated.
        epsilon: largest ε of all clients, which the same run would have in a deployment; infinite without privacy.
        bytes_up: bytes that all clients sent.
        bytes_down: bytes that all clients received.
        seconds: seconds from the start of the first round to the end of the last one.
        folder: the run's folder.
    """

    method: str
    seed: int
    plan: RunPlan
    records: tuple[RoundRecord, ...]
    epsilon: float
    bytes_up: int
    bytes_down: int
    seconds: float
    folder: Path

    @classmethod
    def of(cls, done: Simulated, folder: Path) -> SimulatedRun:
        """Return what remains of a run that has ended, without its model.

        Args:
            done: the run.
            folder: its folder.
        """
        return cls(str(done.method), done.seed, done.federation.plan, done.result.records,
                   max(done.epsilons.values()), done.bytes_up, done.bytes_down, done.seconds, folder)

    @property
    def figures(self) -> Mapping[str, float]:
        """The figures on the held-out rows after the last round, never the best one; empty without --eval-data."""
        return self.records[-1].evaluation if self.records else {}

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, in PEFT's format."""
        return self.folder / "adapter"

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        report: dict[str, Any] = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        return report


@dataclass(frozen=True)
class Simulation:
    """The results of all methods with all seeds.

    Attributes:
        folder: the folder with the comparison and the folders of the runs.
        comparisons: for each method, the summary over its seeds.
        runs: the runs, those of one method together.
    """

    folder: Path
    comparisons: tuple[Comparison, ...]
    runs: tuple[SimulatedRun, ...]

    @property
    def adapter(self) -> Path:
        """The adapter's folder, if there is one run.

        Raises:
            ValueError: there are several runs; each of `runs` has its own.
        """
        if len(self.runs) != 1:
            raise ValueError(f"there are {len(self.runs)} runs, each with an adapter of its own: take "
                             "result.runs[0].adapter, say")
        return self.runs[0].adapter

    def table(self) -> Table:
        """Return the table that the command prints, one row for each method. Notebooks show it as it is."""
        return table(self.comparisons)

    def plot(self) -> Figure:
        """Return the picture of the metric over the rounds and after the last one, with error bars over the seeds.

        Raises:
            ValueError: nothing was evaluated.
        """
        if not self.comparisons[0].metric:
            raise ValueError("there is no figure to draw: nothing was evaluated; give eval_data, a file of held-out "
                             "rows")
        return drawn(self.comparisons)

    def rows(self) -> list[dict[str, Any]]:
        """Return one mapping for each run, with its figures by name, as a data frame or a CSV file takes them."""
        return [{"method": run.method, "seed": run.seed, "epsilon": run.epsilon, "rounds": run.records[-1].round,
                 **run.figures, "bytes_up": run.bytes_up, "bytes_down": run.bytes_down, "seconds": run.seconds}
                for run in self.runs]
