"""Strategies of a module outside of the packages, made of parts that are found by their keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlora import registry
from fedlora_strategies import FedAvgLoRA, FedSVD


def part(seam: str, key: str, name: str) -> Any:
    """Return a part with its default options."""
    return getattr(registry.load(f"fedlora_strategies.{seam}", key), name)()


def __getattr__(name: str) -> Any:
    """Return a recipe when it is asked for, because a tree need not have every toy."""
    if name == "GeometricMedian":
        return replace(FedSVD.recipe, reduction=part("reductions", "geometric-median", "REDUCTION"))
    if name == "Balanced":
        return replace(FedAvgLoRA.recipe, refactorization=part("refactorizations", "balanced", "REFACTORIZATION"))
    if name == "Alternating":
        return replace(FedAvgLoRA.recipe, schedule=part("schedules", "alternating", "SCHEDULE"))
    raise AttributeError(name)
