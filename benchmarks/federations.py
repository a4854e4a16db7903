"""Federations that train nothing: plans, adapter layouts and clients that echo, for measuring all but the training."""

from __future__ import annotations

from typing import Any

import numpy as np

import fedlora
from fedlora.adapters import AdapterLayout, Site, TensorSpec, family_of
from fedlora.plan import ModelRef, Released, RoundPlan, RunPlan, Tensors, Upload

FAMILY_STRATEGIES = {"lora": "fedavg-lora", "frozen-a": "ffa-lora", "bra": "fed-sb"}
"""Family of adapters → key of a strategy that trains them."""

MINILM = {"layers": 6, "width": 384}
SEVEN_B = {"layers": 32, "width": 4096}


def plan(strategy: str, family: str, **changes: Any) -> RunPlan:
    """Return a run plan of one round with one SGD step; `changes` replace its fields."""
    values = dict(
        run_id="0" * 16, fedlora_version=fedlora.__version__, strategy=strategy, family=family, private=True,
        model=ModelRef("local", "0" * 64, "0" * 64, "0" * 64), task="classification", labels=("no", "yes"),
        max_length=64, rank=8, alpha=8.0, targets=("q", "v"), train_head=True, dropout=0.0, rounds=1,
        max_participations=1, local_steps=1, expected_batch=32, optimizer="sgd", lr=1e-3, clip_norm=1.0,
        adapter_scale=1.0, head_scale=1.0, weight_by_examples=False)
    return RunPlan(**values | changes)  # type: ignore[arg-type]


def layout(family: str, *, layers: int, width: int, rank: int) -> AdapterLayout:
    """Return the layout of adapters on the query and value projections of every layer.

    Args:
        family: key of the family of adapters.
        layers: number of layers of the model.
        width: rows and columns of each projection.
        rank: rank of every adapter.
    """
    return AdapterLayout.of(family_of(family), [Site(f"layer.{i}.{target}", width, width, rank, 1.0)
                                                for i in range(layers) for target in "qv"])


def tensors(specs: tuple[TensorSpec, ...], seed: int) -> dict[str, np.ndarray]:
    """Return tensors of these shapes with standard normal values, float32."""
    random = np.random.default_rng(seed)
    return {spec.name: random.standard_normal(spec.shape, np.float32) for spec in specs}


class Echo:
    """A client that trains nothing: it answers every order at once with the trained tensors it received."""

    def __init__(self, layout: AdapterLayout) -> None:
        self._trained = [spec.name for spec in layout.trained]

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload:
        """Return an upload of the received tensors that a client would train."""
        names = plan.active or self._trained
        return Upload(*plan.key, tensors=Released({name: tensors[name] for name in names}), steps=1, delta=1e-5,
                      noise_multiplier=1.0)
