"""Strategies of somebody who changes nothing of ours: what they are made of lies beside ours by its key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlora import registry
from fedlora_strategies import FedAvgLoRA, FedSVD


def part(seam: str, key: str, name: str) -> Any:
    return getattr(registry.load(f"fedlora_strategies.{seam}", key), name)()


def __getattr__(name: str) -> Any:
    """Each by itself: a tree has one of the toys alone."""
    if name == "Median":
        return replace(FedSVD.recipe, reduction=part("reductions", "median", "REDUCTION"))
    if name == "Alternating":
        return replace(FedAvgLoRA.recipe, schedule=part("schedules", "alternating", "SCHEDULE"))
    raise AttributeError(name)
