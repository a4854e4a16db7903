"""One factor: train B in odd rounds and A in even ones; heads and all else in every round.

The product B·A of two trained factors is not linear in them together, but it is in each of them. So the mean over
clients is exact in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedlora.adapters import AdapterLayout

from .constant import Constant


@dataclass(frozen=True)
class OneFactor(Constant):
    """The schedule in which the two factors take turns. It changes nothing for families that train one of them."""

    @override
    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        names = frozenset(spec.name for spec in layout.trained)
        A, B = (frozenset(spec.name for spec in layout.trained
                          if spec.group == "adapter" and spec.name.endswith(f".{factor}")) for factor in "AB")
        if not A or not B:
            return frozenset()  # all of them
        return names - (A if round % 2 else B)


SCHEDULE = OneFactor
