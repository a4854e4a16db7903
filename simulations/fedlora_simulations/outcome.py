"""The results of a simulation, as `fedlora_simulations.simulate` returns them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from .comparison import Comparison, drawn, table
from .pairing import grouped
from .results import Result
from .tables import Value, lines


@dataclass(frozen=True)
class Simulation:
    """The results of all methods with all seeds.

    Attributes:
        folder: the folder with the comparison and the folders of the runs.
        comparisons: for each method, the summary over its seeds.
        runs: the results, in the order in which they were run.
    """

    folder: Path
    comparisons: tuple[Comparison, ...]
    runs: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The runs that ended early, which only a sweep goes on after."""
        return tuple(run for run in self.runs if run.status != "finished")

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

    def rows(self) -> list[dict[str, Value]]:
        """Return one mapping for each run, with the columns of results.csv, as a data frame takes them."""
        return lines(grouped(self.runs))
