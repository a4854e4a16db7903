"""The weighted mean, Σ w u / Σ w, taken one upload at a time.

In float64 and in the order of the uploads: one copy in memory, however many clients there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlora.algebra import WeightedMean


@dataclass(frozen=True)
class Mean:
    """Whether weights are numbers of examples or 1 is the plan's to say (`weight_by_examples`)."""

    linear: ClassVar[bool] = True

    def begin(self) -> WeightedMean:
        return WeightedMean()


REDUCTION = Mean
