"""Low-rank adapters with both factors trained: ΔW = s·B·A.

Hu et al., ICLR 2022, arXiv:2106.09685.

    A   (r, d_in)    trained, from the start's bases
    B   (d_out, r)   trained, starts at 0

The update is bilinear in the trained factors. So averaging the factors of several clients does not average their
updates exactly, and the product contains the product of the two factors' noises.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.updates import LowRank
from fedlora.plan import Tensors


class LowRankDelta(Delta):
    """The update s·B(A x) as a chain of leaves; other leaves may stand between A and B."""

    def __init__(self, scaling: float, *factors: nn.Module) -> None:
        super().__init__()
        self.scaling = scaling
        self.factors = nn.ModuleList(factors)

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        for factor in self.factors:
            x = factor(x)
        return x * self.scaling


@dataclass(frozen=True)
class Lora(Family):
    """The family in which both factors train. `trains_A` is False in subclasses that freeze A."""

    name: ClassVar[str] = "lora"
    exact: ClassVar[bool] = False
    bases: ClassVar[tuple[str, ...]] = ("A",)
    narrows: ClassVar[bool] = True
    trains_A: ClassVar[bool] = True

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.A", (site.rank, site.d_in), trains=self.trains_A, sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, site.rank), sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return LowRankDelta(site.scaling, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                            leaves.linear(f"{site.name}.B", site.d_out, site.rank))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        return {f"{site.name}.A": bases.A, f"{site.name}.B": torch.zeros(site.d_out, site.rank)}

    @override
    def exact_in(self, trained: Collection[str]) -> bool:
        sites = {factor: {name[:-2] for name in trained if name.endswith(f".{factor}")} for factor in "AB"}
        return self.exact or not sites["A"] & sites["B"]

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        return LowRank(B=state[f"{site.name}.B"], A=state[f"{site.name}.A"])


FAMILY = Lora
