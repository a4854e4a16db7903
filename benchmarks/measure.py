"""What every figure of the benchmark shares: how it is measured, what a measurement is, and how a figure is added.

A figure is one module in `benchmarks/figures/`. Nothing else need be edited: the file's name (with "-"
for "_") is the sub-command, the first line of its docstring the title and the help text, and it holds

    def measure(settings: Settings) -> Iterator[Row]:
        times = interleaved({"plain": plain_step, "private": private_step}, settings.repeats(15))
        yield Row("frozen-a r=8, fp32", {
            "ratio": times["private"].over(times["plain"], target=1.02),
            "CPU ratio": times["private"].cpu_over(times["plain"]),
            "private": times["private"].value()})

    FIGURE = Figure(1, measure)

`measure` yields a `Row` for each case as soon as it is measured; a row's name is unique within the figure and does not
change from release to release, since results are compared by it. Each `Value` is a median with quartiles. What counts
is a ratio (`RATIO`) of two things that were measured in turn, in one session: that alone can be compared between
machines. Other units (s, bytes, …) are there to be read; `benchmarks compare` looks at them only between results of one
machine.

    interleaved(variants, repeats)      times them in the order ABCCBA, CBAABC, …, after one warm-up of each
    Times.over(other), .cpu_over(other) the ratio: block by block, so that the machine's drift cancels
    Times.value()                       the seconds themselves
    Value.of(samples, unit)             of anything that was measured repeatedly
    exactly(number, unit)               of what does not vary: bytes on the wire, counts; no peak of memory

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
"""Unit of the values that can be compared between machines."""

TOLERANCE, TOLERANCE_ONCE = 0.01, 0.05
"""Share of the median by which quartiles of what was measured may be apart without any meaning: of what was measured
repeatedly, and of what was measured once and so has no spread."""

VERSIONS = ("fedlora", "torch", "transformers", "peft", "opacus", "flwr", "grpcio", "numpy")


class Unavailable(Exception):
    """This figure cannot be measured here; the message says why and what would help."""


@dataclass(frozen=True)
class Settings:
    """What all figures are measured on.

    Attributes:
        data: a file or folder of rows with a text and a label.
        model: alias, folder or hub id of the base model.
        device: "cpu" or "cuda".
        threads: of the CPU; None leaves PyTorch's default.
        quick: sizes that take seconds and say nothing about speed.
        most_repeats: an upper limit to every figure's repeats; None for none.
    """

    data: Path
    model: str = "minilm"
    device: str = "cpu"
    threads: int | None = None
    quick: bool = False
    most_repeats: int | None = None

    def repeats(self, wanted: int) -> int:
        """How often to measure, where a figure would choose `wanted`."""
        return min(2 if self.quick else wanted, self.most_repeats or wanted)


@dataclass(frozen=True)
class Value:
    """A measured number.

    Attributes:
        median, low, high: low and high are the quartiles.
        unit: RATIO, or a unit such as "s", "ms", "MiB", "records/s".
        better: "lower" or "higher"; None for what is neither good nor bad.
        target: what is to be reached; None if nothing was promised.
        tolerance: share of the median that is noise beside the spread; 0 for what is counted.
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
        """Median and quartiles of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], unit, better, target, TOLERANCE_ONCE)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, unit, better, target, TOLERANCE)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None if there is none."""
        if self.target is None:
            return None
        return self.median >= self.target if self.better == "higher" else self.median <= self.target


def exactly(number: float, unit: str, *, better: str | None = None, target: float | None = None) -> Value:
    """A value that is counted, not measured: whatever it changes by is a change."""
    return Value(number, number, number, unit, better, target)


@dataclass(frozen=True)
class Row:
    """One case of a figure: its name, what was measured, and a remark that the numbers need."""

    case: str
    values: Mapping[str, Value]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures.

    Attributes:
        number: in that table; figures are run in this order.
        measure: yields the rows.
    """

    number: int
    measure: Callable[[Settings], Iterator[Row]]


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, block by block: of the wall clock, and of this process's CPU time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def over(self, other: Times, *, factor: float = 1.0, better: str = "lower", target: float | None = None) -> Value:
        """This variant's wall time over another's of the same `interleaved`, times a factor: 10, say, if the other one
        does its work ten times when it is called.
        """
        return _ratio(self.wall, other.wall, factor, better, target)

    def cpu_over(self, other: Times, *, factor: float = 1.0, better: str = "lower",
                 target: float | None = None) -> Value:
        """The same of CPU time, which other processes disturb less; work in child processes is not in it."""
        return _ratio(self.cpu, other.cpu, factor, better, target)

    def value(self, unit: str = "s", *, parts: int = 1) -> Value:
        """The wall seconds, or with unit "ms" milliseconds, of each of so many equal parts."""
        return Value.of([second * {"s": 1.0, "ms": 1e3}[unit] / parts for second in self.wall], unit)


def _ratio(mine: Sequence[float], others: Sequence[float], factor: float, better: str, target: float | None) -> Value:
    return Value.of([factor * a / b for a, b in zip(mine, others, strict=True)], RATIO, better=better, target=target)


def interleaved(variants: Mapping[str, Callable[[int], object]], repeats: int, *,
                settle: Callable[[], object] = lambda: None, warm_up: bool = True) -> dict[str, Times]:
    """Time variants in turn, so that what drifts (clock, heat, other processes) meets all alike.

    Args:
        variants: name → what is timed; it is given the number of the block, from 0, to take the same inputs as the
            others of that block. Each is called once before, untimed, with block 0.
        repeats: blocks; each calls every variant twice, once in each direction, and keeps the mean.
        settle: called before each reading of the clock, as `torch.cuda.synchronize`.
        warm_up: False leaves out the untimed calls, of what takes minutes.
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
    """What the figures were measured on, without naming it."""
    import torch

    found = {"processor": _processor(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count(), "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
             "system": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
             "load": round(os.getloadavg()[0], 2)}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def versions() -> dict[str, str]:
    """Of Python and of what decides the speed."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.machine())


def to_json(figure: Figure, title: str, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """A measured figure, as in a result file."""
    return {"number": figure.number, "title": title, "seconds": round(seconds, 1),
            "rows": [{"case": row.case, "values": {name: asdict(value) for name, value in row.values.items()}}
                     | ({"note": row.note} if row.note else {}) for row in rows]}


def value_from_json(fields: Mapping[str, Any]) -> Value:
    """Inverse of `to_json` for one value.

    Raises:
        ValueError: other fields than a value has.
    """
    try:
        return Value(**fields)
    except TypeError as error:
        raise ValueError(f"a value with fields {sorted(fields)}: not a result file of this FedLoRA version") from error
