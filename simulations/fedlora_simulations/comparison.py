"""Comparison of several methods over several seeds: a table, a JSON file and a picture with error bars.

`tables`, `latex` and `compare_page` show sweeps, and what several commands have run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from fedlora import style
from fedlora.figures import title
from fedlora.quantities import quantity
from fedlora_server.observer import jsonable

from .results import Result, of_run
from .simulated_run import Simulated


@dataclass(frozen=True)
class Comparison:
    """One method's results over its seeds. The last round counts, never the best one.

    Attributes:
        method: the method, as --strategy names it.
        metric: name of the task's metric, or None without --eval-data.
        values: the metric after the last round, one value for each seed.
        before: the metric before the first round, one value for each seed.
        curve: (round, mean, standard deviation) of the metric for each evaluated round.
        epsilon: largest ε of all clients and seeds, for their own noise; infinite without privacy.
        values_up: trained values that a client uploads in a round.
        bytes_up: mean bytes that a client sends in a round.
        bytes_down: mean bytes that a client receives in a round.
        rounds: number of rounds.
        seconds: mean duration of a run, over the seeds.
        settings: swept option → its value; empty without a sweep.
        seeds: the seeds, in the order of `values`.
        tuned: option that --tune chose → its value.
        epsilon_of_sums: largest ε of all clients and seeds towards whoever sees the sums alone; None without secure
            aggregation.
    """

    method: str
    metric: str | None
    values: tuple[float, ...]
    before: tuple[float, ...]
    curve: tuple[tuple[int, float, float], ...]
    epsilon: float
    values_up: int
    bytes_up: float
    bytes_down: float
    rounds: int
    seconds: float
    settings: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    tuned: Mapping[str, str] = field(default_factory=dict)
    epsilon_of_sums: float | None = None

    @property
    def label(self) -> str:
        """The method with its setting, for a picture."""
        return ", ".join((self.method, *(f"{name}={value}" for name, value in self.settings.items())))


MOST_DRAWN = 12
"""Most methods and settings that comparison.png shows. compare.html shows more."""


def summarize(runs: Sequence[Simulated]) -> Comparison:
    """Summarize the runs of one method, one run for each seed."""
    return summarize_results([of_run(run) for run in runs], {})


def summarize_results(results: Sequence[Result], settings: Mapping[str, str]) -> Comparison:
    """Summarize the results of one method and one setting, one result for each seed.

    Args:
        results: the results.
        settings: swept option → its value.
    """
    first = results[0]
    metric, curve, values, before = first.metric, [], [], []
    if metric:
        histories = [{one.round: one.figures[metric] for one in result.evaluated} for result in results]
        for number in sorted(set.intersection(*map(set, histories))):
            curve.append((number, *mean_and_deviation([history[number] for history in histories])))
        values, before = [result.value for result in results], [result.before for result in results]
    up, down = bytes_of_an_upload(results)
    return Comparison(
        first.method, metric, tuple(values), tuple(before), tuple(curve),
        epsilon=max(result.epsilon for result in results), values_up=first.values_up,
        bytes_up=up, bytes_down=down,
        rounds=first.last_round, seconds=mean_and_deviation([result.seconds for result in results])[0],
        settings=settings, seeds=tuple(result.seed for result in results), tuned=first.tuned,
        epsilon_of_sums=largest_of_sums(results))


def bytes_of_an_upload(results: Iterable[Result]) -> tuple[float, float]:
    """Return the mean bytes that a client sends and receives in a round; a start before the first is left out."""
    rounds = [one for result in results for one in result.trained_rounds]
    uploads = max(1, sum(one.uploads for one in rounds))
    return sum(one.bytes_up for one in rounds) / uploads, sum(one.bytes_down for one in rounds) / uploads


def largest_of_sums(results: Iterable[Result]) -> float | None:
    """Return the largest ε towards whoever sees the sums alone; None if no run has secure aggregation."""
    return max((one.epsilon_of_sums for one in results if one.epsilon_of_sums is not None), default=None)


OF_SUMS = "ε of sums"
"""The column of the ε towards whoever sees the sums of secure aggregation alone."""


def told_of_sums(epsilon: float | None) -> str:
    """Return an ε towards whoever sees sums alone, for a table."""
    return "–" if epsilon is None else "none" if math.isinf(epsilon) else f"{epsilon:.2f}"


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return the table that compares the methods, one row for each."""
    metric = comparisons[0].metric
    sums = any(c.epsilon_of_sums is not None for c in comparisons)
    shown = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left", title=(  # fits 80 columns
        "bytes are per client and round; ε is that of the same run in a deployment" + (
            f",\nfor each client's own noise and, as {OF_SUMS}, towards whoever sees sums alone" if sums else "")))
    for name in ("method", *(("before", metric) if metric else ()), "ε", *((OF_SUMS,) if sums else ()), "rounds", "up",
                 "down", "seconds"):
        shown.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for c in comparisons:
        evaluated = []
        if metric:
            mean, deviation = mean_and_deviation(c.values)
            spread = f" ± {deviation:.3f}" if len(c.values) > 1 else ""
            evaluated = [f"{mean_and_deviation(c.before)[0]:.3f}", f"{mean:.3f}{spread}"]
        shown.add_row(c.method, *evaluated, "none" if math.isinf(c.epsilon) else f"{c.epsilon:.2f}",
                      *((told_of_sums(c.epsilon_of_sums),) if sums else ()), str(c.rounds), quantity(c.bytes_up),
                      quantity(c.bytes_down), f"{c.seconds:.0f}")
    return shown


def save(folder: Path, comparisons: Sequence[Comparison], about: Mapping[str, object]) -> None:
    """Write comparison.json, and comparison.png if there is a metric to plot for no more than `MOST_DRAWN` curves.

    Args:
        folder: the folder to write them to.
        comparisons: the summaries, at least one.
        about: goes into the JSON too.
    """
    runs = [asdict(c) | {name: value if value is not None and math.isfinite(value) else None for name, value in (
        ("epsilon", c.epsilon), ("epsilon_of_sums", c.epsilon_of_sums))} for c in comparisons]
    (folder / "comparison.json").write_text(json.dumps(jsonable({
        **about, "noise": "seeded and repeatable: no ε holds for these very outputs", "methods": runs}),
        indent=1, allow_nan=False))
    if comparisons[0].metric and len(comparisons) <= MOST_DRAWN:
        style.save(drawn(comparisons), folder / "comparison.png")


def drawn(comparisons: Sequence[Comparison]) -> Figure:
    """Return the picture of the comparison: the metric over the rounds, and after the last one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, c in enumerate(comparisons):
        rounds, mean, deviation = (list(column) for column in zip(*c.curve, strict=True))
        look = style.series(i)
        curves.plot(rounds, mean, label=c.label, **look.line(len(rounds)))
        curves.fill_between(rounds, [m - d for m, d in zip(mean, deviation, strict=True)],
                            [m + d for m, d in zip(mean, deviation, strict=True)], color=look.colour, alpha=0.15, lw=0)
        average, spread = mean_and_deviation(c.values)
        if math.isfinite(average):
            bars.barh(c.label, average, xerr=spread or None, color=look.colour, ecolor=style.INK, capsize=3)
            bars.annotate(f" {average:.3f}", (average + spread, i), va="center", color=style.INK, fontsize=9)
        else:
            bars.barh(c.label, 0)
            bars.annotate(" diverged", (0, i), va="center", color=style.INK, fontsize=9)
    bars.invert_yaxis()
    curves.xaxis.get_major_locator().set_params(integer=True)
    metric = title(comparisons[0].metric or "")
    curves.set(xlabel="round", title=f"{metric} after each evaluated round")
    style.explain(curves)
    epsilons = sorted({c.epsilon for c in comparisons})
    told = ("not private" if math.isinf(epsilons[0]) else f"ε = {epsilons[0]:.1f} per client"
            if len({f"{one:.1f}" for one in epsilons}) == 1 else "several ε")
    seeds = sorted({len(c.values) for c in comparisons})  # counts differ if a run of the last seed failed
    counted = f"{' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}"
    finite = [value for c in comparisons for value in c.values if math.isfinite(value)]
    bars.set(title=f"{metric} after the last round", xlim=(0, 1.2 * max(finite, default=1.0)))
    style.finish(curves)
    style.finish(bars, grid="x")
    style.head(figure, f"{told}, mean and deviation of {counted}")
    return figure


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the deviation of a single value is 0."""
    with np.errstate(invalid="ignore"):  # values may be infinite
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
