"""Peak memory of a private step against a plain one, each in a process of its own, beside Opacus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..fresh import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from ..measure import RATIO, Figure, Row, Settings, Value
from ..peers import MODES, opacus_step
from ..subjects import cut_to_length, rows_of, subject
from .step import FAMILIES, PRECISIONS, TARGET

STEPS = 3


def measure(settings: Settings) -> Iterator[Row]:
    records, length = (4, 16) if settings.quick else (32, 128)
    variants = ("plain", "private", *MODES)
    for family, rank in FAMILIES[:1] if settings.quick else FAMILIES:
        for precision in PRECISIONS[:1] if settings.quick else PRECISIONS:
            held: dict[str, list[dict[str, int]]] = {variant: [] for variant in variants}
            for _ in range(1 if settings.quick else settings.repeats(3)):
                for variant in variants:
                    held[variant].append(in_fresh_process(
                        f"{__name__}:step", variant=variant, family=family, rank=rank, precision=precision,
                        records=records, length=length, settings={**vars(settings), "data": str(settings.data)}))

            def over(variant: str, what: str, target: float | None = None,
                     held: dict[str, list[dict[str, int]]] = held) -> Value:
                pairs = zip(held[variant], held["plain"], strict=True)
                return Value.of([mine[what] / plain[what] for mine, plain in pairs], RATIO, better="lower",
                                target=target)

            yield Row(f"{family} r={rank}, {records} × {length}, {precision}", {
                "private ÷ plain": over("private", "peak", TARGET),
                **{f"Opacus {mode} ÷ plain": over(mode, "peak") for mode in MODES},
                "beyond the model: private ÷ plain": over("private", "step"),
                **{f"Opacus {mode}": over(mode, "step") for mode in MODES},
                "plain": Value.of([one["peak"] / 2**20 for one in held["plain"]], "MiB")})


def step(variant: str, family: str, rank: int, precision: str, records: int, length: int,
         settings: dict[str, Any]) -> dict[str, int]:
    """In bytes: "peak" of the process (of the GPU, if it trains there), and what the "step" added to the model."""
    chosen = Settings(**{**settings, "data": Path(settings["data"])})
    rows = cut_to_length(rows_of(chosen), records)
    one = subject(chosen, rows, family=family, rank=rank, precision=precision, expected_batch=records,
                  max_length=length, micro_batch=records)
    train = opacus_step(one, variant) if variant in MODES else partial(one.train, private=variant == "private")
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
