"""A private step against a plain one on the same batch, beside Opacus with hooks and with ghost clipping.

The private and the plain step are timed in turn. Opacus is timed after them, in turn with another plain step, because
a step right after Opacus's is slower: it finds the memory that Opacus gave back. On a GPU the work of a round outside
its steps, such as its checks, takes a noticeable part of a step; rounds there have as many steps as in a private
preset.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..measure import Figure, Row, Settings, interleaved
from ..peers import MODES, opacus_round
from ..subjects import cut_to_length, precisions, rows_of, settle, subject

FAMILIES = (("frozen-a", 8), ("bra", 32))
TARGET = 1.02
STEPS = {"cpu": 1, "cuda": 4}
"""Steps of a round, by device."""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each family of adapters, length of records and precision."""
    records, lengths = (4, (16,)) if settings.quick else (32, (64, 128))
    steps = STEPS[settings.device]
    rows = cut_to_length(rows_of(settings), records)
    for family, rank in FAMILIES:
        rank = 2 if settings.quick else rank
        for length in lengths:
            for precision in precisions(settings):
                made = partial(subject, settings, rows, family=family, rank=rank, precision=precision,
                               expected_batch=records, max_length=length, micro_batch=records, steps=steps)
                one = made()
                plain = partial(one.train, private=False)
                times = interleaved({"plain": plain, "private": partial(one.train, private=True)},
                                    settings.repeats(15), settle=settle(settings.device))
                peers = interleaved({"plain": plain, **{mode: opacus_round(made(), mode) for mode in MODES}},
                                    settings.repeats(15), settle=settle(settings.device))
                yield Row(f"{family} r={rank}, {records} × {length}, {precision}", {
                    "private ÷ plain": times["private"].over(times["plain"], target=TARGET),
                    "CPU time": times["private"].cpu_over(times["plain"]),
                    **{f"Opacus {mode} ÷ plain": peers[mode].over(peers["plain"]) for mode in MODES},
                    "plain": times["plain"].value("ms", parts=steps)})


FIGURE = Figure(1, measure)
