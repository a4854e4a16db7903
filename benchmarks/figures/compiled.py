"""A private step on CUDA with the model's blocks compiled (--compile), against one without.

A round has as many steps as in a private preset.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory
from unittest.mock import patch

from ..measure import Figure, Row, Settings, Unavailable, Value, interleaved
from ..subjects import cut_to_length, precisions, rows_of, settle, subject
from .step import STEPS


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each precision."""
    if settings.device != "cuda":
        raise Unavailable("--compile is for CUDA, where micro-batches have few shapes; measure it with --device cuda")
    records, length, rank = (4, 16, 2) if settings.quick else (32, 64, 8)
    rows = cut_to_length(rows_of(settings), records)
    for precision in precisions(settings):
        made = partial(subject, settings, rows, family="frozen-a", rank=rank, precision=precision,
                       expected_batch=records, max_length=length, micro_batch=records, steps=STEPS["cuda"])
        plain, compiled = made(), made(compiled=True)
        plain.train(0, private=True)
        began = time.perf_counter()
        plain.train(0, private=True)
        without = time.perf_counter() - began
        with TemporaryDirectory() as empty, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=empty):
            began = time.perf_counter()
            compiled.train(0, private=True)
            first = time.perf_counter() - began
        times = interleaved({"plain": partial(plain.train, private=True),
                             "compiled": partial(compiled.train, private=True)},
                            settings.repeats(15), settle=settle(settings.device))
        yield Row(f"frozen-a r={rank}, {records} × {length}, {precision}", {
            "plain ÷ compiled": times["plain"].over(times["compiled"], better="higher"),
            "compiled": times["compiled"].value("ms", parts=STEPS["cuda"]),
            "to compile": Value.of([first - without], "s")})


FIGURE = Figure(14, measure)
