"""A private step on CUDA with the model's blocks compiled (--compile), against one without

In rounds of as many steps as a private preset's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from ..measure import Figure, Row, Settings, Unavailable, Value, exactly, interleaved
from ..subjects import cut_to_length, rows_of, settle, subject
from .step import PRECISIONS, STEPS


def measure(settings: Settings) -> Iterator[Row]:
    if settings.device != "cuda":
        raise Unavailable("--compile is for CUDA, where micro-batches have few shapes; measure it with --device cuda")
    records, length, rank = (4, 16, 2) if settings.quick else (32, 64, 8)
    rows = cut_to_length(rows_of(settings), records)
    for precision in PRECISIONS:
        made = partial(subject, settings, rows, family="frozen-a", rank=rank, precision=precision,
                       expected_batch=records, max_length=length, micro_batch=records, steps=STEPS["cuda"])
        variants = {"plain": made(), "compiled": made(compiled=True)}
        first = {}
        for name, one in variants.items():
            began = time.perf_counter()
            one.train(0, private=True)
            first[name] = time.perf_counter() - began
        times = interleaved({name: partial(one.train, private=True) for name, one in variants.items()},
                            settings.repeats(15), settle=settle(settings.device))
        yield Row(f"frozen-a r={rank}, {records} × {length}, {precision}", {
            "plain ÷ compiled": times["plain"].over(times["compiled"], better="higher"),
            "compiled": Value.of([1e3 * second / STEPS["cuda"] for second in times["compiled"].wall], "ms"),
            "seconds to compile": exactly(first["compiled"] - first["plain"], "s")})


FIGURE = Figure(14, measure)
