"""Cryptographic sampling and noise in a private step, against PyTorch's generator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fedlora.privacy import RandomStream

from ..measure import Figure, Row, Settings, interleaved
from ..subjects import rows_of, settle, subject

UNITS = 60_000
"""Units in the data set that is sampled from; each of them takes one random number in every step."""


class _Unsafe(RandomStream):
    """PyTorch's default generator behind the interface of a stream, one draw for each value. For comparison only."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, count: int) -> np.ndarray:
        return torch.rand(count, generator=self._generator, dtype=torch.float64).numpy()

    def gaussian(self, count: int) -> np.ndarray:
        return torch.randn(count, generator=self._generator, dtype=torch.float64).numpy()


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each family of adapters."""
    batch, length, units = (4, 16, 100) if settings.quick else (256, 64, UNITS)
    rows = rows_of(settings)
    rows = rows.take([i % len(rows) for i in range(batch)])
    for family, rank in (("frozen-a", 8), ("bra", 16)):
        one = subject(settings, rows, family=family, rank=2 if settings.quick else rank, precision="fp32",
                      expected_batch=batch, max_length=length)
        values = one.adapted.layout.num_trained

        def step(make: type[RandomStream], block: int) -> None:
            sampling, noise = (_Unsafe(2 * block + i) if make is _Unsafe else RandomStream.from_os() for i in range(2))
            sampling.uniform(units - batch)  # also draw for the units that the trainer does not hold
            one.step({"sampling": sampling, "noise": noise})  # noqa: B023

        def draws(block: int) -> None:
            RandomStream.from_os().uniform(units)
            RandomStream.from_os().gaussian(values)  # noqa: B023

        times = interleaved({"safe": lambda block: step(RandomStream, block),
                             "unsafe": lambda block: step(_Unsafe, block), "draws": draws},
                            settings.repeats(9), settle=settle(settings.device))
        yield Row(f"{family} r={rank}, {values:,} values, batch {batch} of {units:,}", {
            "cryptographic ÷ torch": times["safe"].cpu_over(times["unsafe"]),
            "share of the step": times["draws"].cpu_over(times["safe"]),
            "draws": times["draws"].value("ms"),
            "step": times["safe"].value("ms")}, note="ratios of CPU time")


FIGURE = Figure(13, measure)
