"""A trained core between two frozen factors: ΔW = s·B·R·A, linear in R.

Singhal et al. (Fed-SB), 2025, arXiv:2502.15436; Ponkshe et al. (LoRA-SB), 2024, arXiv:2411.19557.

    A   (r, d_in)    frozen, from the start's bases
    R   (r, r)       trained, starts at 0
    B   (d_out, r)   frozen, from the start's bases

Each upload has r² values per site, whatever the width of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from fedlora.adapters.families.lora import LowRankDelta
from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, LowRank, Site, TensorSpec
from fedlora.plan import Tensors


@dataclass(frozen=True)
class Bra(Family):
    """The family in which only the core R trains."""

    name: ClassVar[str] = "bra"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ("A", "B")

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.A", (site.rank, site.d_in), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, site.rank), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.R", (site.rank, site.rank), sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return LowRankDelta(site.scaling, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                            leaves.linear(f"{site.name}.R", site.rank, site.rank),
                            leaves.linear(f"{site.name}.B", site.d_out, site.rank))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.B is not None, "a start without B is refused earlier"
        return {f"{site.name}.A": bases.A, f"{site.name}.B": bases.B,
                f"{site.name}.R": torch.zeros(site.rank, site.rank)}

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        B, R = state[f"{site.name}.B"].astype(np.float64), state[f"{site.name}.R"]
        return LowRank(B=B @ R, A=state[f"{site.name}.A"])


FAMILY = Bra
