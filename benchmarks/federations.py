"""Federations to measure that train nothing: plans, layouts and clients that send back what they were sent."""

from __future__ import annotations

from typing import Any

import numpy as np

import fedlora
from fedlora.adapters import AdapterLayout, Site, TensorSpec, family_of
from fedlora.plan import ModelRef, Released, RoundPlan, RunPlan, Tensors, Upload

FAMILY_STRATEGIES = {"lora": "fedavg-lora", "frozen-a": "ffa-lora", "bra": "fed-sb"}
"""Of adapters → a strategy that trains them."""

MINILM = {"layers": 6, "width": 384}
SEVEN_B = {"layers": 32, "width": 4096}


def plan(strategy: str, family: str, **changes: Any) -> RunPlan:
    """A plan of one round of one SGD step; `changes` replace its fields."""
    values = dict(
        run_id="0" * 16, fedlora_version=fedlora.__version__, strategy=strategy, family=family, private=True,
        model=ModelRef("local", "0" * 64, "0" * 64, "0" * 64), task="classification", labels=("no", "yes"),
        max_length=64, rank=8, alpha=8.0, targets=("q", "v"), train_head=True, dropout=0.0, rounds=1,
        max_participations=1, local_steps=1, expected_batch=32, optimizer="sgd", lr=1e-3, clip_norm=1.0,
        adapter_scale=1.0, head_scale=1.0, weight_by_examples=False)
    return RunPlan(**values | changes)  # type: ignore[arg-type]


def layout(family: str, *, layers: int, width: int, rank: int) -> AdapterLayout:
    """Of adapters on the queries and values, width × width each, of a model with so many layers."""
    return AdapterLayout.of(family_of(family), [Site(f"layer.{i}.{target}", width, width, rank, 1.0)
                                                for i in range(layers) for target in "qv"])


def tensors(specs: tuple[TensorSpec, ...], seed: int) -> dict[str, np.ndarray]:
    """Random values, float32."""
    random = np.random.default_rng(seed)
    return {spec.name: random.standard_normal(spec.shape, np.float32) for spec in specs}


class Echo:
    """A client that answers every order at once with the tensors that it would have trained."""

    def __init__(self, layout: AdapterLayout) -> None:
        self._trained = [spec.name for spec in layout.trained]

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload:
        return Upload(*plan.key, tensors=Released({name: tensors[name] for name in self._trained}), steps=1, delta=1e-5,
                      noise_multiplier=1.0)
