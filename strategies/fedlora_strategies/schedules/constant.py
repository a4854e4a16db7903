"""Every round trains everything, and nothing happens in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors


@dataclass(frozen=True)
class Constant:
    """No options and no memory; others override what they change."""

    refreshes_frozen: ClassVar[bool] = False

    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        return frozenset()

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        return {}

    def between(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
                rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        return state, own


SCHEDULE = Constant
