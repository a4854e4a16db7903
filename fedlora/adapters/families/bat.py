"""Blocks of the weight times a trained block for each row of blocks: ΔW = s·(W0 + I)·b block by block, linear in b.

Kang and Yin (MiSS, formerly Bone), 2024, arXiv:2409.15371, the form "bat". W0 is cut into blocks of r × r. With o for a
block's row and c for its column,

    b_o    (r, r)    trained, starts at 0, shared by the blocks of a row
    ΔW_oc  (r, r)    = s·(W_oc + I)·b_o

All b_o together are one tensor b (d_out, r). There is nothing frozen but the weight, so no start is needed. The update
has full rank. PEFT holds it as MiSS if all layers have one rank and keep their weights as (d_out, d_in).

Each token is multiplied with every b_o before the weight's blocks: d_out·d_in / r values for each, which makes small
ranks slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.updates import Blocks
from fedlora.plan import Tensors


class BatDelta(Delta):
    """The update s·Σ_c (W_oc + I) b_o x_c of each block o of the output."""

    def __init__(self, scaling: float, b: nn.Module, rank: int) -> None:
        super().__init__()
        self.scaling, self.rank = scaling, rank
        self.b = b

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        assert isinstance(weight, torch.Tensor)
        r, rows, columns = self.rank, weight.shape[0] // self.rank, weight.shape[1] // self.rank
        blocks = weight.to(x.dtype).reshape(rows, r, columns, r) + torch.eye(
            r, dtype=x.dtype, device=x.device)[:, None]  # (o, i, c, j)
        inner: torch.Tensor = self.b(x.reshape(*x.shape[:-1], columns, r))  # [..., c, (o, j)]
        inner = inner.reshape(-1, columns, rows, r).permute(2, 0, 1, 3).flatten(2)  # [o, positions, (c, j)]
        added = torch.bmm(inner, blocks.permute(0, 2, 3, 1).flatten(1, 2))  # [o, positions, i]
        return added.transpose(0, 1).reshape(output.shape) * self.scaling


@dataclass(frozen=True)
class Bat(Family):
    """The family in which one block for each row of the weight's blocks trains."""

    name: ClassVar[str] = "bat"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ()

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [TensorSpec(f"{site.name}.b", (site.d_out, site.rank), sites=(site.name,)) for site in sites]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        common = math.gcd(site.d_out, site.d_in)
        if common % site.rank:
            fit = ", ".join(str(rank) for rank in range(1, common + 1) if common % rank == 0)
            raise ValueError(f"rank {site.rank} does not divide both sides of {site.name} ({site.d_out} × {site.d_in})"
                             ", and the adapter family bat cuts the weight into blocks of rank × rank. Ranks that fit "
                             f"there: {fit}")
        return BatDelta(site.scaling, leaves.linear(f"{site.name}.b", site.d_out, site.rank), site.rank)

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        return {f"{site.name}.b": torch.zeros(site.d_out, site.rank)}

    @override
    def update(self, state: Tensors, site: Site) -> Blocks:
        return Blocks(state[f"{site.name}.b"])


FAMILY = Bat
