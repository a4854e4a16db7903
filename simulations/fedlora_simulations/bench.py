"""fedlora-simulate bench: how fast a training step is, and what privacy adds to it, on a real model and real text.

Steps with and without privacy are timed in turn on the same batches, so that the machine's drift meets both alike, and
medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedlora.adapters import attach, automatic_targets, initial_tensors
from fedlora.data import read
from fedlora.models import load, reference, resolve
from fedlora.plan import RunPlan
from fedlora.privacy import Stream
from fedlora.tasks import Records, task_for
from fedlora.training import Trainer

FAMILY_STRATEGIES = {"lora": "fedavg-lora", "frozen-a": "ffa-lora", "bra": "fed-sb"}


def step_plan(folder: Path, labels: Sequence[str], *, model: str = "minilm", family: str = "frozen-a", rank: int = 8,
              expected_batch: int = 256, max_length: int = 64, train_head: bool = True,
              targets: Sequence[str] = ()) -> RunPlan:
    """A plan of one private step a round, for measurements."""
    return RunPlan(
        run_id="0" * 16, fedlora_version="bench", strategy=FAMILY_STRATEGIES[family], family=family, private=True,
        model=reference(model, folder), task="classification", labels=tuple(labels), max_length=max_length, rank=rank,
        alpha=float(rank), targets=tuple(targets), train_head=train_head, dropout=0.0, rounds=1, max_participations=1,
        local_steps=1, expected_batch=expected_batch, optimizer="sgd", lr=1e-3, clip_norm=1.0, adapter_scale=1.0,
        head_scale=1.0, weight_by_examples=False)


def step_trainer(data: Path, precision: str, *, model: str = "minilm", threads: int | None = None,
                 micro_batch: int | None = None, **plan: object) -> tuple[Trainer, RunPlan, Records]:
    """A trainer on `data` (rows with a text and one of two labels), its plan and the encoded records."""
    folder = resolve(model)
    rows = read(data, "classification")
    labels = tuple(sorted({label for label in rows.labels or () if label is not None}))
    loaded = load(folder, "classification", len(labels))
    targets = automatic_targets(loaded.model)
    run = step_plan(folder, labels, model=model, targets=targets, **plan)  # type: ignore[arg-type]
    adapted = attach(loaded, family=run.family, rank=run.rank, alpha=run.alpha, targets=targets,
                     train_head=run.train_head)
    adapted.write(initial_tensors(adapted, init="orthonormal", seed=0))
    task = task_for(run, loaded.tokenizer)
    trainer = Trainer(adapted, task, device="cpu", precision=precision, micro_batch=micro_batch, threads=threads)
    return trainer, run, task.encode(rows)


def step_ratio(data: Path, *, model: str = "minilm", family: str = "frozen-a", rank: int = 8,
               expected_batch: int = 256, max_length: int = 64, repeats: int = 15, threads: int | None = 2,
               micro_batch: int | None = None,
               precisions: Sequence[str] = ("fp32", "bf16")) -> dict[str, dict[str, float]]:
    """Time a private step against a non-private one on the same drawn batches.

    Args:
        data: training rows, as a client's --data.
        repeats: number of draws; each is trained on twice with privacy and twice without, in alternating order.
    Returns:
        For each precision: plain_s and private_s (medians of a step), ratio (of these medians), the same as CPU time
        (which other processes disturb less; with one thread it is the fairer figure on a busy machine), records and
        tokens of the median draw, and examples_per_s with privacy.
    """
    result = {}
    for precision in precisions:
        trainer, run, records = step_trainer(data, precision, model=model, family=family, rank=rank, threads=threads,
                                             expected_batch=expected_batch, max_length=max_length,
                                             micro_batch=micro_batch)
        rate = min(1.0, expected_batch / len(records))
        start = trainer.adapted.read("trained")
        drawn: list[int] = []

        def step(draw: int, private: bool) -> None:
            trainer.adapted.write(start)  # noqa: B023 - called within this iteration
            outcome = trainer.train(  # noqa: B023
                run, records, sampling_rate=rate, noise_multiplier=1.0 if private else None,  # noqa: B023
                clip_norm=run.clip_norm,  # noqa: B023
                sampling=Stream.derived(0, "bench", draw, "sampling"),
                noise=Stream.derived(0, "bench", draw, "noise") if private else None)
            drawn.extend(outcome.drawn)  # noqa: B023

        seconds, cpu_seconds = _interleaved(step, repeats)
        result[precision] = {
            "plain_s": seconds[0], "private_s": seconds[1], "ratio": seconds[1] / seconds[0],
            "plain_cpu_s": cpu_seconds[0], "private_cpu_s": cpu_seconds[1],
            "cpu_ratio": cpu_seconds[1] / cpu_seconds[0], "records": statistics.median(drawn),
            "tokens": float(np.mean(records.lengths)) * statistics.median(drawn),
            "examples_per_s": statistics.median(drawn) / seconds[1], "threads": torch.get_num_threads()}
    return result


def _interleaved(step: Callable[[int, bool], None],
                 repeats: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median (without, with privacy) of wall seconds and of the process's CPU seconds, in the order ABBA, BAAB, …."""
    wall: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    for private in (False, True):
        step(0, private)
    for draw in range(repeats):
        order = (False, True, True, False) if draw % 2 == 0 else (True, False, False, True)
        for private in order:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            step(draw, private)
            wall[private].append(time.perf_counter() - begin)
            cpu[private].append(time.process_time() - cpu_begin)
    return ((statistics.median(wall[False]), statistics.median(wall[True])),
            (statistics.median(cpu[False]), statistics.median(cpu[True])))


def main(argv: Sequence[str]) -> int:
    """`fedlora-simulate bench --data FILE`: print the ratios as a table, or as JSON."""
    parser = argparse.ArgumentParser(prog="fedlora-simulate bench", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="training rows with a text and one of two labels")
    parser.add_argument("--family", choices=FAMILY_STRATEGIES, default="frozen-a")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    try:
        measured = step_ratio(options.data, family=options.family, rank=options.rank, repeats=options.repeats,
                              expected_batch=options.batch_size, threads=options.threads)
    except ValueError as error:
        print(f"fedlora-simulate bench: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(measured, indent=1))
        return 0
    table = Table(title=f"private ÷ non-private step, {options.family} r={options.rank}, batch {options.batch_size}, "
                        "medians", box=None, title_justify="left")
    for name in ("precision", "private s", "plain s", "ratio", "CPU ratio", "examples/s"):
        table.add_column(name, justify="right")
    for precision, figures in measured.items():
        table.add_row(precision, f"{figures['private_s']:.3f}", f"{figures['plain_s']:.3f}", f"{figures['ratio']:.3f}",
                      f"{figures['cpu_ratio']:.3f}", f"{figures['examples_per_s']:.0f}")
    Console().print(table)
    return 0
