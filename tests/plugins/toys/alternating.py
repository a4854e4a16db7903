"""RoLoRA: train B and the head in odd rounds, A in even ones.

Chen et al., RoLoRA, 2025, arXiv:2502.01755. Adapters whose A does not train train everything else in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.adapters import AdapterLayout
from fedlora_strategies.schedules.constant import Constant


@dataclass(frozen=True)
class Alternating(Constant):
    """The alternating schedule.

    Attributes:
        period: The number of rounds of one factor before it is the other's turn.
    """

    period: int = 1

    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        names = frozenset(spec.name for spec in layout.trained)
        first = frozenset(name for name in names if name.endswith(".A"))
        if not first:
            return frozenset()
        return first if (round - 1) // self.period % 2 else names - first


SCHEDULE = Alternating
