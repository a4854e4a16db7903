"""A private step against a plain one on the same batch, beside Opacus' hooks and ghost clipping."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..measure import Figure, Row, Settings, interleaved
from ..peers import MODES, opacus_step
from ..subjects import cut_to_length, rows_of, settle, subject

FAMILIES = (("frozen-a", 8), ("bra", 32))
PRECISIONS = ("fp32", "bf16")
TARGET = 1.02


def measure(settings: Settings) -> Iterator[Row]:
    records, lengths = (4, (16,)) if settings.quick else (32, (64, 128))
    rows = cut_to_length(rows_of(settings), records)
    for family, rank in FAMILIES:
        rank = 2 if settings.quick else rank
        for length in lengths:
            for precision in PRECISIONS:
                made = partial(subject, settings, rows, family=family, rank=rank, precision=precision,
                               expected_batch=records, max_length=length, micro_batch=records)
                one = made()
                times = interleaved({
                    "plain": partial(one.train, private=False),
                    "private": partial(one.train, private=True),
                    **{mode: opacus_step(made(), mode) for mode in MODES},
                }, settings.repeats(15), settle=settle(settings.device))
                yield Row(f"{family} r={rank}, {records} × {length}, {precision}", {
                    "private ÷ plain": times["private"].over(times["plain"], target=TARGET),
                    "CPU time": times["private"].cpu_over(times["plain"]),
                    **{f"Opacus {mode} ÷ plain": times[mode].over(times["plain"]) for mode in MODES},
                    "plain": times["plain"].value("ms")})


FIGURE = Figure(1, measure)
