"""Measuring for all figures: timing in turn, values with quartiles, and the recipe for adding a figure.

A figure is one module in `benchmarks/figures/`; no other file has to be edited. The file's name (with "-" for "_") is
the sub-command, the first line of its docstring is the title and the help text, and it holds

    def measure(settings: Settings) -> Iterator[Row]:
        times = interleaved({"plain": plain_step, "private": private_step}, settings.repeats(15))
        yield Row("frozen-a r=8, fp32", {
            "ratio": times["private"].over(times["plain"], target=1.02),
            "CPU ratio": times["private"].cpu_over(times["plain"]),
            "private": times["private"].value()})

    FIGURE = Figure(1, measure)

`measure` yields a `Row` for each case as soon as it is measured. A row's name is unique within the figure and stays the
same from release to release, because results are compared by it. Each `Value` is a median with quartiles.

The values that count are ratios (`RATIO`) of two things that were measured in turn in one session: only these can be
compared between machines. Values in other units (s, bytes, …) are there to be read; `compare` considers them only
between results of one machine.

    interleaved(variants, repeats)      time variants in the order ABCCBA, CBAABC, …, after one warm-up of each
    Times.over(other), .cpu_over(other) a ratio, formed block by block so that the machine's drift cancels
    Times.value()                       the seconds themselves
    Value.of(samples, unit)             median and quartiles of anything measured repeatedly
    exactly(number, unit)               a value that does not vary, such as bytes on the wire; not for peak memory

A figure that needs a process of its own (peak memory, imports) starts one with `benchmarks.fresh.in_fresh_process`.
`benchmarks.subjects` has models, rows and trainers to measure. `settings.data` is always a file. `settings.quick` asks
for sizes that take seconds: tests use it with a tiny random model, and assert nothing about times. A figure raises
`Unavailable` for what the machine cannot do (no CUDA, a missing extra); its message is shown and the other figures go
on.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RATIO = "ratio"
"""Unit of values that can be compared between machines."""

TOLERANCE, TOLERANCE_ONCE = 0.01, 0.05
"""Largest gap between quartile ranges that counts as no change, as a share of the median: for values measured
repeatedly, and for those measured only once, which have no spread."""

VERSIONS = ("fedlora", "torch", "transformers", "peft", "opacus", "flwr", "grpcio", "numpy")


class Unavailable(Exception):
    """Raised by a figure that cannot be measured here; the message says why and what would help."""


@dataclass(frozen=True)
class Settings:
    """The data, model and device that all figures are measured on.

    Attributes:
        data: a file or folder of rows with a text and a label.
        model: alias, folder or hub id of the base model.
        device: "cpu" or "cuda".
        threads: CPU threads; None leaves PyTorch's default.
        quick: use sizes that take seconds and say nothing about speed.
        most_repeats: upper limit on the repeats of every figure; None for no limit.
    """

    data: Path
    model: str = "minilm"
    device: str = "cpu"
    threads: int | None = None
    quick: bool = False
    most_repeats: int | None = None

    def repeats(self, wanted: int) -> int:
        """Return how often to measure what a figure wants to measure `wanted` times."""
        return min(2 if self.quick else wanted, self.most_repeats or wanted)


@dataclass(frozen=True)
class Value:
    """A measured number with its spread.

    Attributes:
        median: median of the samples.
        low: lower quartile.
        high: upper quartile.
        unit: RATIO, or a unit such as "s", "ms", "MiB", "records/s".
        better: "lower" or "higher"; None if neither is better.
        target: bound that the median should meet; None if there is none.
        tolerance: noise beyond the spread, as a share of the median; 0 for counted values.
    """

    median: float
    low: float
    high: float
    unit: str
    better: str | None = None
    target: float | None = None
    tolerance: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[float], unit: str, *, better: str | None = None,
           target: float | None = None) -> Value:
        """Return the median and quartiles of one sample or more."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], unit, better, target, TOLERANCE_ONCE)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, unit, better, target, TOLERANCE)

    @property
    def reached(self) -> bool | None:
        """Return whether the median meets the target; None if there is no target."""
        if self.target is None:
            return None
        return self.median >= self.target if self.better == "higher" else self.median <= self.target


def exactly(number: float, unit: str, *, better: str | None = None, target: float | None = None) -> Value:
    """Return a value that was counted, not measured: any difference in it is a change."""
    return Value(number, number, number, unit, better, target)


@dataclass(frozen=True)
class Row:
    """One case of a figure: its name, its values, and a note on how to read them."""

    case: str
    values: Mapping[str, Value]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of the benchmark.

    Attributes:
        number: its number in result files; figures are measured in this order.
        measure: yields the rows.
    """

    number: int
    measure: Callable[[Settings], Iterator[Row]]


@dataclass(frozen=True)
class Times:
    """Seconds that one variant took in each block: wall-clock time, and CPU time of this process over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def over(self, other: Times, *, factor: float = 1.0, better: str = "lower", target: float | None = None) -> Value:
        """Return the ratio of this variant's wall time to that of another variant of the same `interleaved` call.

        Args:
            other: times of the other variant.
            factor: multiplies the ratio: 10, say, if the other variant does its work ten times in one call.
            better: "lower" or "higher".
            target: bound that the ratio should meet.
        """
        return _ratio(self.wall, other.wall, factor, better, target)

    def cpu_over(self, other: Times, *, factor: float = 1.0, better: str = "lower",
                 target: float | None = None) -> Value:
        """Return the ratio of CPU times, with the arguments of `over`.

        Other processes disturb CPU time less than wall time. Work in child processes is not counted.
        """
        return _ratio(self.cpu, other.cpu, factor, better, target)

    def value(self, unit: str = "s", *, parts: int = 1) -> Value:
        """Return the wall time of one of `parts` equal parts of a call, in "s" or "ms"."""
        return Value.of([second * {"s": 1.0, "ms": 1e3}[unit] / parts for second in self.wall], unit)


def _ratio(mine: Sequence[float], others: Sequence[float], factor: float, better: str, target: float | None) -> Value:
    return Value.of([factor * a / b for a, b in zip(mine, others, strict=True)], RATIO, better=better, target=target)


def interleaved(variants: Mapping[str, Callable[[int], object]], repeats: int, *,
                settle: Callable[[], object] = lambda: None, warm_up: bool = True) -> dict[str, Times]:
    """Time variants in turn, so that drift (of clock rate, heat, other processes) affects all of them alike.

    Args:
        variants: name → function to time. It is given the number of the block, from 0, so that all variants can use the
            same inputs in a block. Each is called once before, untimed, with block 0.
        repeats: number of blocks. Each calls every variant twice, once in each order, and keeps the mean.
        settle: called before each reading of the clock, such as `torch.cuda.synchronize`.
        warm_up: False leaves out the untimed calls, for variants that take minutes.
    """
    times = {name: Times() for name in variants}
    if warm_up:
        for variant in variants.values():
            variant(0)
    for block in range(repeats):
        there, back = list(variants), list(variants)[::-1]
        order = there + back if block % 2 == 0 else back + there
        wall, cpu = dict.fromkeys(variants, 0.0), dict.fromkeys(variants, 0.0)
        for name in order:
            settle()
            began, cpu_began = time.perf_counter(), time.process_time()
            variants[name](block)
            settle()
            wall[name] += (time.perf_counter() - began) / 2
            cpu[name] += (time.process_time() - cpu_began) / 2
        for name, kept in times.items():
            kept.wall.append(wall[name])
            kept.cpu.append(cpu[name])
    return times


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe this machine for a result file: its kind, without its name."""
    import torch

    found = {"processor": _processor(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count(), "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
             "system": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
             "load": round(os.getloadavg()[0], 2)}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the speed."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.machine())


def to_json(figure: Figure, title: str, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """Return a measured figure as it stands in a result file."""
    return {"number": figure.number, "title": title, "seconds": round(seconds, 1),
            "rows": [{"case": row.case, "values": {name: asdict(value) for name, value in row.values.items()}}
                     | ({"note": row.note} if row.note else {}) for row in rows]}


def value_from_json(fields: Mapping[str, Any]) -> Value:
    """Return the value that these fields of a result file describe.

    Raises:
        ValueError: the fields are not those of a value.
    """
    try:
        return Value(**fields)
    except TypeError as error:
        raise ValueError(f"a value has the fields {sorted(fields)}: this is not a result file of this FedLoRA version; "
                         "measure again") from error
