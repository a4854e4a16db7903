"""The lengths of the weight's rows beside a low-rank adapter with A frozen: ΔW is linear in both trained tensors.

Liu et al. (DoRA), ICML 2024, arXiv:2402.09353, change the directions of the rows by B·A and divide by the new lengths,
which is not linear. Here B·A is added beside the rescaled weight, and A is frozen (FFA-LoRA, arXiv:2403.12313).

    V   (d_out,)     frozen, one over the length of each row of W0
    e   (d_out,)     trained, starts at 0
    A   (r, d_in)    frozen, random, with rows of length 1
    B   (d_out, r)   trained, starts at 0

    ΔW = s·(diag(e)·diag(V)·W0 + B·A)

PEFT holds it exactly as a DoRA adapter of rank r: W0 + ΔW = diag(d)·(W0 + s·diag(1/d)·B·A) with d = 1 + s·e·V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.families.frozen_a import FrozenA
from fedlora.adapters.families.row_scale import RowLengths
from fedlora.adapters.family import Bases, Delta, Draw, Leaves, Site, TensorSpec
from fedlora.adapters.updates import RowScale
from fedlora.plan import Tensors


class SumDelta(Delta):
    """The sum of two updates."""

    def __init__(self, one: Delta, other: Delta) -> None:
        super().__init__()
        self.one, self.other = one, other

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        added: torch.Tensor = self.one(x, output, base) + self.other(x, output, base)
        return added


@dataclass(frozen=True)
class RowScaleFrozenA(RowLengths):
    """The family in which the lengths of the weight's rows and the factor B train."""

    name: ClassVar[str] = "row-scale-frozen-a"

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [*super().specs(sites), *FrozenA().specs(sites)]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return SumDelta(super().build(site, leaves), FrozenA().build(site, leaves))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        A = draw(f"{site.name}.A", (site.rank, site.d_in))
        low_rank = FrozenA().initial(site, Bases(A / A.norm(dim=1, keepdim=True), None), draw)
        return {**super().initial(site, bases, draw), **low_rank}

    @override
    def update(self, state: Tensors, site: Site) -> RowScale:
        scaled, low_rank = super().update(state, site), FrozenA().update(state, site)
        return RowScale(scaled.rows, scaled.lengths, low_rank)


FAMILY = RowScaleFrozenA
