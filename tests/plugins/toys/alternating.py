"""A and B train in turn, each for some rounds, and the head with B.

`one-factor` is such a schedule of one round each. Where A is frozen, everything else trains in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora_strategies.schedules.constant import Constant


@dataclass(frozen=True)
class Alternating(Constant):
    """A schedule of two turns.

    Attributes:
        period: rounds before the turn changes.
    """

    period: int = 1

    @override
    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        names = frozenset(spec.name for spec in layout.trained)
        first = frozenset(name for name in names if name.endswith(".A"))
        if not first:
            return frozenset()  # all of them
        return first if (round - 1) // self.period % 2 else names - first


SCHEDULE = Alternating
