"""B alone: train B, heads and all else in every round, but never A.

A is a trained tensor of the family, so it is sent in every round; the server may change it between rounds. The update
is linear in what trains, so the mean over clients is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedlora.adapters import AdapterLayout

from .constant import Constant


@dataclass(frozen=True)
class BAlone(Constant):
    """The schedule in which A is never trained. It changes nothing for families whose A is frozen anyway."""

    @override
    def trains(self, round: int, layout: AdapterLayout) -> frozenset[str]:
        names = frozenset(spec.name for spec in layout.trained)
        A = frozenset(spec.name for spec in layout.trained if spec.group == "adapter" and spec.name.endswith(".A"))
        return names - A if A and names - A else frozenset()  # all of them


SCHEDULE = BAlone
