"""Constant: train all trained tensors in every round, and change nothing between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors

from . import Schedule


@dataclass(frozen=True)
class Constant(Schedule):
    """The constant schedule, without options or memory. Other schedules inherit it and override what they change."""

    refreshes_frozen: ClassVar[bool] = False
    form: ClassVar[str] = ""

    @override
    def check(self, layout: AdapterLayout) -> None:
        pass

    @override
    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        return frozenset()

    @override
    def prefixes(self, round: int, layout: AdapterLayout, own: Tensors, rng: np.random.Generator) -> Mapping[str, int]:
        return {}

    @override
    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        return {}

    @override
    def between(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
                rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        return state, own


SCHEDULE = Constant
