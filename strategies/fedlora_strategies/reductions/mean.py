"""Weighted mean: average the uploads, Σ w u / Σ w, one upload at a time.

It sums in float64 and in the order of the uploads, and keeps one copy in memory, however many clients there are. It
withstands no hostile client by itself: one upload of any length moves the mean as far as it likes. Screening
(`fedlora_strategies.screening`) limits that length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedlora.algebra import WeightedMean
from fedlora.plan import Tensors

from . import Reduction


@dataclass(frozen=True)
class Mean(Reduction):
    """The weighted mean. The plan's `weight_by_examples` decides whether weights are numbers of examples or 1."""

    linear: ClassVar[bool] = True

    @override
    def begin(self, sent: Tensors) -> WeightedMean:
        return WeightedMean()


REDUCTION = Mean
