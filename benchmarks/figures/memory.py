"""Peak memory of a private step against a plain one, beside Opacus.

Each is measured in a process of its own: the peak of the whole process, and how far it exceeds what the process held
before its first step (the model, the libraries and the records). On a GPU both count what PyTorch has allocated there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..fresh import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from ..measure import RATIO, Figure, Row, Settings, Unavailable, Value
from ..peers import MODES, opacus_round
from ..subjects import cut_to_length, precisions, rows_of, subject
from .step import FAMILIES, TARGET

STEPS = 3

WHAT = {"whole process": "peak", "beyond the model": "step"}
"""Heading of a value → key of the measurement that `step` returns."""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each family of adapters, length of records and precision."""
    if settings.device == "cpu" and not forget_peak():
        raise Unavailable("this system cannot tell the peak memory of a step from that of loading the model (this "
                          "needs a writable /proc/self/clear_refs, as on Linux); measure it on Linux or with "
                          "--device cuda")
    cases = [(FAMILIES[0], 16, "fp32")] if settings.quick else itertools.product(
        FAMILIES, (64, 128), precisions(settings))
    for (family, rank), length, precision in cases:
        records = 4 if settings.quick else 32
        held = _held(settings, family=family, rank=rank, precision=precision, records=records, length=length)
        yield Row(f"{family} r={rank}, {records} × {length}, {precision}", {
            **{f"{name}: {variant} ÷ plain": _over(held, variant, what, TARGET if variant == "private" else None)
               for name, what in WHAT.items() for variant in held if variant != "plain"},
            "plain": Value.of([one["peak"] / 2**20 for one in held["plain"]], "MiB")})


def _held(settings: Settings, **case: Any) -> dict[str, list[dict[str, int]]]:
    """Measure each variant with `step`, repeatedly and in turn; return the measurements by variant."""
    peers = () if settings.quick else MODES  # each of them would start a process that imports everything
    variants = {"plain": "plain", "private": "private", **{f"Opacus {mode}": mode for mode in peers}}
    held: dict[str, list[dict[str, int]]] = {name: [] for name in variants}
    for _ in range(1 if settings.quick else settings.repeats(3)):
        for name, variant in variants.items():
            held[name].append(in_fresh_process(f"{__name__}:step", variant=variant, **case,
                                               settings={**vars(settings), "data": str(settings.data)}))
    return held


def _over(held: Mapping[str, list[dict[str, int]]], variant: str, what: str, target: float | None) -> Value:
    pairs = zip(held[variant], held["plain"], strict=True)
    return Value.of([mine[what] / plain[what] for mine, plain in pairs], RATIO, better="lower", target=target)


def step(variant: str, family: str, rank: int, precision: str, records: int, length: int,
         settings: dict[str, Any]) -> dict[str, int]:
    """Train a few steps of one variant in this process and measure its memory.

    Returns:
        Bytes: "peak" of the process, or of the GPU if it trains there, and "step", the part added since before the
        first step.
    """
    chosen = Settings(**{**settings, "data": Path(settings["data"])})
    rows = cut_to_length(rows_of(chosen), records)
    one = subject(chosen, rows, family=family, rank=rank, precision=precision, expected_batch=records,
                  max_length=length, micro_batch=records)
    train = opacus_round(one, variant) if variant in MODES else partial(one.train, private=variant == "private")
    on_gpu = chosen.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes()
    for block in range(STEPS):
        train(block)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    return {"peak": peak, "step": peak - before}


FIGURE = Figure(2, measure)
