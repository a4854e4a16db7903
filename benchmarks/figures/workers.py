"""Two worker processes (--workers) with half of the cores each, against one process with all of them.

A round has 8 clients with 4 steps each. One process leaves cores idle while it runs Python, draws noise, or multiplies
matrices too small to split. Workers do not, but they compete for caches and memory; the row's second ratio shows how
much, against one worker that does half of a round alone. So workers gain more the fewer tokens a step has. If there is
a GPU, they share it.

Measure it on an otherwise idle machine. Where cores are shared with other work, the threads of one process spin while
they wait for one that is not scheduled, and the ratio says little about the workers. (At a load of 8 on two cores, 8
clients × 2 records × 64 tokens in fp32 took one process 17 times as long.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

from fedlora.models import resolve
from fedlora.training import Trainer, TrainingJob
from fedlora_simulations.processes import ProcessWorkers
from fedlora_simulations.worker import Blueprint, Workers, threads_each

from ..measure import Figure, Row, Settings, interleaved
from ..subjects import cut_to_length, precisions, rows_of, settle, subject

WORKERS = 2
STEPS = 4
TARGET = 1.6


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each precision, length of records and number of records."""
    clients, batches_of = (2, {16: (2,)}) if settings.quick else (8, {16: (2, 8), 64: (2, 8, 32)})
    chosen = ("fp32",) if settings.quick else precisions(settings)
    for precision, (length, batches) in itertools.product(chosen, batches_of.items()):
        rows = cut_to_length(rows_of(settings), clients * max(batches))
        one = subject(settings, rows, family="frozen-a", rank=2 if settings.quick else 8, precision=precision,
                      expected_batch=max(batches), max_length=length, steps=STEPS)
        workers = ProcessWorkers(Blueprint(one.plan, resolve(settings.model), settings.device, precision, None,
                                           worker_threads(settings.threads)), WORKERS)
        try:
            for records in batches:
                rounds = one.rounds(rows.take(range(clients * records)), records, private=True)
                times = interleaved({
                    "one": partial(_alone, one.trainer, rounds),
                    "workers": partial(_shared_out, workers, rounds),
                    "half": partial(_half, workers, rounds),
                }, settings.repeats(5), settle=settle(settings.device))
                yield Row(f"{clients} clients × {records} × {length}, {precision}", {
                    "one process ÷ workers": times["one"].over(times["workers"], better="higher", target=TARGET),
                    "workers ÷ half on one of them": times["workers"].over(times["half"]),
                    "one process": times["one"].value("ms"), "workers": times["workers"].value("ms")})
        finally:
            workers.close()


def worker_threads(threads: int | None) -> int:
    """Return the CPU threads of each worker: together they have `threads`, or with None all cores."""
    return threads_each(WORKERS) if threads is None else max(1, threads // WORKERS)


def _alone(trainer: Trainer, rounds: Iterator[list[TrainingJob]], block: int) -> None:
    for training in next(rounds):
        trainer.train(training)


def _shared_out(workers: Workers, rounds: Iterator[list[TrainingJob]], block: int) -> None:
    waiting = next(rounds)
    left = len(waiting)
    while left:
        while waiting and workers.free:
            workers.start("", [waiting.pop()])
        workers.done()
        left -= 1


def _half(workers: Workers, rounds: Iterator[list[TrainingJob]], block: int) -> None:
    """Train half of a round on one worker while the other has nothing to do."""
    trainings = next(rounds)
    for training in trainings[:len(trainings) // WORKERS]:
        workers.start("", [training])
        workers.done()


FIGURE = Figure(12, measure)
