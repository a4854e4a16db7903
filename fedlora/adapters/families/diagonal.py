"""A trained diagonal between two frozen factors: ΔW = s·B·diag(e)·A, linear in e.

The parts of four methods in which nothing but the diagonal trains: with the start `lu`, LoLDU (2024, arXiv:2410.13618);
with `weight`, the upper part of SALT (2025, arXiv:2503.16055); with `orthonormal`, S2-LoRA (2023, arXiv:2309.11756) and
RandLoRA (ICLR 2025, arXiv:2502.00987).

    A   (r, d_in)    frozen, from the start's bases
    e   (r,)         trained, starts at 0
    B   (d_out, r)   frozen, from the start's bases

Each upload has r values per site. It is the family `bra` with a core that stays diagonal.
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
class Diagonal(Family):
    """The family in which only the diagonal e trains."""

    name: ClassVar[str] = "diagonal"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ("A", "B")

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.A", (site.rank, site.d_in), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, site.rank), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.e", (site.rank,), sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return LowRankDelta(site.scaling, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                            leaves.diagonal(f"{site.name}.e", site.rank),
                            leaves.linear(f"{site.name}.B", site.d_out, site.rank))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.B is not None, "a start without B is refused earlier"
        return {f"{site.name}.A": bases.A, f"{site.name}.B": bases.B, f"{site.name}.e": torch.zeros(site.rank)}

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        B, e = state[f"{site.name}.B"].astype(np.float64), state[f"{site.name}.e"]
        return LowRank(B=B * e, A=state[f"{site.name}.A"])


FAMILY = Diagonal
