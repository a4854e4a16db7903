"""Many small clients in lockstep over one pass of the base model (--batch-clients), against one after the other.

Each of 8 clients contributes 2 records of 64 tokens to a step. Some work cannot be shared, which bounds the gain: every
client draws its noise from a stream of its own, forms its own sum and runs its own optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fedlora.training import Trainer, TrainingJob

from ..measure import Figure, Row, Settings, interleaved
from ..subjects import cut_to_length, precisions, rows_of, settle, subject

FAMILIES = (("frozen-a", 8), ("bra", 32))
STEPS = 4
TARGET = 1.3


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each family and precision, with and without privacy."""
    clients, records, length = (2, 2, 16) if settings.quick else (8, 2, 64)
    rows = cut_to_length(rows_of(settings), clients * records)
    for family, rank in FAMILIES:
        rank = 2 if settings.quick else rank
        for precision in precisions(settings):
            one = subject(settings, rows, family=family, rank=rank, precision=precision, expected_batch=records,
                          max_length=length, steps=STEPS)
            for private in (True, False):
                rounds = one.rounds(rows, records, private=private)
                times = interleaved({
                    "sequential": partial(_sequential, one.trainer, rounds),
                    "together": partial(_together, one.trainer, rounds),
                }, settings.repeats(15), settle=settle(settings.device))
                kind = "private" if private else "not private"
                yield Row(f"{family} r={rank}, {clients} clients × {records} × {length}, {precision}, {kind}", {
                    "sequential ÷ together": times["sequential"].over(times["together"], better="higher",
                                                                      target=TARGET),
                    "CPU time": times["sequential"].cpu_over(times["together"], better="higher"),
                    "together": times["together"].value("ms")})


def _sequential(trainer: Trainer, rounds: Iterator[list[TrainingJob]], block: int) -> None:
    for training in next(rounds):
        trainer.train(training)


def _together(trainer: Trainer, rounds: Iterator[list[TrainingJob]], block: int) -> None:
    trainer.train_together(next(rounds))


FIGURE = Figure(11, measure)
