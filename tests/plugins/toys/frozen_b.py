"""Low-rank adapters with B frozen: ΔW = s·B·A, linear in A.

Every client writes to the outputs that the columns of B span, and learns which inputs to read for them.

    A   (r, d_in)    trained, starts at 0, times `gain`
    B   (d_out, r)   frozen, from the start's bases
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from fedlora.adapters.families.lora import LowRankDelta
from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.updates import LowRank
from fedlora.plan import Tensors


@dataclass(frozen=True)
class FrozenB(Family):
    """A family in which only the factor A trains.

    Attributes:
        gain: factor on the update, beside s.
    """

    name: ClassVar[str] = "frozen-b"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ("B",)
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"gain is {self.gain:g}; it must be positive")

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.A", (site.rank, site.d_in), sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, site.rank), trains=False, sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return LowRankDelta(site.scaling * self.gain, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                            leaves.linear(f"{site.name}.B", site.d_out, site.rank))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.B is not None, "a start without B is refused for this family"
        return {f"{site.name}.A": torch.zeros(site.rank, site.d_in), f"{site.name}.B": bases.B}

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        return LowRank(B=self.gain * state[f"{site.name}.B"], A=state[f"{site.name}.A"])


FAMILY = FrozenB
