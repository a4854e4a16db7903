"""FedSVD's thin refactorisation of B·A against the full SVD, and the growth of its time over three sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from fedlora_strategies.refactorizations.svd import refactorize

from ..measure import Figure, Row, Settings, Value, interleaved

AT_ONCE = 10
"""Refactorisations timed together, because one takes only milliseconds."""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each size; one of them has the full SVD beside it."""
    sizes, rank, full = ((64, 128, 256), 4, 128) if settings.quick else ((1024, 4096, 16384), 16, 4096)
    states = {size: _factors(size, rank) for size in sizes}

    def thin(size: int, block: int) -> None:
        for _ in range(AT_ONCE):
            refactorize(states[size], "layer")

    # the full SVD takes most of a minute, so it is timed without a warm-up
    B, A = (torch.from_numpy(states[full][f"layer.{factor}"]) for factor in "BA")
    against = interleaved({"full": lambda block: torch.linalg.svd(B @ A), "thin": partial(thin, full)},
                          settings.repeats(1), warm_up=False)
    grown = interleaved({f"{size}": partial(thin, size) for size in sizes}, settings.repeats(15))
    smallest = grown[f"{sizes[0]}"]
    for size in sizes:
        times = grown[f"{size}"]
        values = {"growth ÷ (m + n)": times.cpu_over(smallest, factor=sizes[0] / size),
                  "thin": Value.of([1e3 * second / AT_ONCE for second in times.wall], "ms")}
        if size == full:
            values = {"full SVD ÷ thin": against["full"].over(against["thin"], factor=AT_ONCE, better="higher",
                                                              target=100.0), **values,
                      "full": against["full"].value()}
        yield Row(f"{size}², r={rank}", values)


def _factors(size: int, rank: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"layer.B": random.standard_normal((size, rank), np.float32),
            "layer.A": random.standard_normal((rank, size), np.float32)}


FIGURE = Figure(7, measure)
