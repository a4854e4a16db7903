"""Peak memory of a private step against a plain one, each in a process of its own, beside Opacus.

Of the whole process, and beyond what it held before its first step: the model, the libraries and the records. On a GPU
both are of what PyTorch has allocated there.
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


def measure(settings: Settings) -> Iterator[Row]:
    if settings.device == "cpu" and not forget_peak():
        raise Unavailable("this system cannot tell a step's peak of memory from that of loading the model (it takes "
                          "/proc/self/clear_refs to be writable, as on Linux); measure it on Linux or with --device "
                          "cuda")
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
    """What `step` gives for each variant, repeatedly and in turn."""
    peers = () if settings.quick else MODES  # each is a process that imports everything
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
    """In bytes: "peak" of the process (of the GPU, if it trains there), and what the "step" added to the model."""
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
