"""Comparison of several methods over several seeds: a table, a JSON file and a picture with error bars."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from fedlora import style
from fedlora.figures import title
from fedlora.quantities import quantity
from fedlora_server.observer import jsonable

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
        epsilon: largest ε of all clients and seeds; infinite without privacy.
        values_up: trained values that a client uploads in a round.
        bytes_up: mean bytes that a client sends in a round.
        bytes_down: mean bytes that a client receives in a round.
        rounds: number of rounds.
        seconds: mean duration of a run, over the seeds.
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


def summarize(runs: Sequence[Simulated]) -> Comparison:
    """Summarize the runs of one method, one run for each seed."""
    first = runs[0]
    last = first.result.records[-1].evaluation if first.result.records else {}
    metric = first.federation.task.metric if last else None
    curve, values, before = [], [], []
    if metric:
        histories = [{r.round: r.evaluation[metric] for r in run.result.records if metric in r.evaluation}
                     for run in runs]
        for number in sorted(set.intersection(*map(set, histories))):
            curve.append((number, *mean_and_deviation([history[number] for history in histories])))
        values = [history[max(history)] for history in histories]
        before = [history[0] for history in histories]
    uploads = sum(len(record.uploaded) for run in runs for record in run.result.records)
    return Comparison(
        str(first.method), metric, tuple(values), tuple(before), tuple(curve),
        epsilon=max(epsilon for run in runs for epsilon in run.epsilons.values()),
        values_up=first.federation.adapted.layout.num_trained,
        bytes_up=sum(run.bytes_up for run in runs) / max(1, uploads),
        bytes_down=sum(run.bytes_down for run in runs) / max(1, uploads),
        rounds=first.result.rounds, seconds=mean_and_deviation([run.seconds for run in runs])[0])


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return the table that compares the methods, one row for each."""
    metric = comparisons[0].metric
    shown = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left", title=(  # fits 80 columns
        "bytes are per client and round; ε is that of the same run in a deployment"))
    for name in ("method", *(("before", metric) if metric else ()), "ε", "rounds", "up", "down", "seconds"):
        shown.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for c in comparisons:
        evaluated = []
        if metric:
            mean, deviation = mean_and_deviation(c.values)
            spread = f" ± {deviation:.3f}" if len(c.values) > 1 else ""
            evaluated = [f"{mean_and_deviation(c.before)[0]:.3f}", f"{mean:.3f}{spread}"]
        shown.add_row(c.method, *evaluated, "none" if math.isinf(c.epsilon) else f"{c.epsilon:.2f}", str(c.rounds),
                      quantity(c.bytes_up), quantity(c.bytes_down), f"{c.seconds:.0f}")
    return shown


def save(folder: Path, comparisons: Sequence[Comparison], about: Mapping[str, object]) -> None:
    """Write comparison.json, and comparison.png if there is a metric to plot; `about` goes into the JSON."""
    runs = [asdict(c) | {"epsilon": None if math.isinf(c.epsilon) else c.epsilon} for c in comparisons]
    (folder / "comparison.json").write_text(json.dumps(jsonable({
        **about, "noise": "seeded and repeatable: no ε holds for these very outputs", "methods": runs}),
        indent=1, allow_nan=False))
    if comparisons[0].metric:
        style.save(drawn(comparisons), folder / "comparison.png")


def drawn(comparisons: Sequence[Comparison]) -> Figure:
    """Return the picture of the comparison: the metric over the rounds, and after the last one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, c in enumerate(comparisons):
        rounds, mean, deviation = (list(column) for column in zip(*c.curve, strict=True))
        look = style.series(i)
        curves.plot(rounds, mean, label=c.method, **look.line(len(rounds)))
        curves.fill_between(rounds, [m - d for m, d in zip(mean, deviation, strict=True)],
                            [m + d for m, d in zip(mean, deviation, strict=True)], color=look.colour, alpha=0.15, lw=0)
        average, spread = mean_and_deviation(c.values)
        if math.isfinite(average):
            bars.barh(c.method, average, xerr=spread or None, color=look.colour, ecolor=style.INK, capsize=3)
            bars.annotate(f" {average:.3f}", (average + spread, i), va="center", color=style.INK, fontsize=9)
        else:
            bars.barh(c.method, 0)
            bars.annotate(" diverged", (0, i), va="center", color=style.INK, fontsize=9)
    bars.invert_yaxis()
    curves.xaxis.get_major_locator().set_params(integer=True)
    metric = title(comparisons[0].metric or "")
    curves.set(xlabel="round", title=f"{metric} after each evaluated round")
    style.explain(curves)
    epsilon = comparisons[0].epsilon
    seeds = sorted({len(c.values) for c in comparisons})  # counts differ if a run of the last seed failed
    counted = f"{' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}"
    finite = [value for c in comparisons for value in c.values if math.isfinite(value)]
    bars.set(title=f"{metric} after the last round", xlim=(0, 1.2 * max(finite, default=1.0)))
    style.finish(curves)
    style.finish(bars, grid="x")
    private = "not private" if math.isinf(epsilon) else f"Îµ = {epsilon:.1f} per client"
    style.head(figure, f"{private}, mean and deviation of {counted}")
    return figure


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the deviation of a single value is 0."""
    with np.errstate(invalid="ignore"):  # values may be infinite
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
