"""A trained core between two frozen factors: ΔW = s·B·R·A, linear in R.

Singhal et al. (Fed-SB), 2025, arXiv:2502.15436; Ponkshe et al. (LoRA-SB), 2024, arXiv:2411.19557.

    A   (r, d_in)    frozen, from the start's bases
    R   (r, r)       trained, starts at 0
    B   (d_out, r)   frozen, from the start's bases

Each upload has r² values per site, whatever the width of the model.

With the option `tie`, sites of the same rank share one core, and each keeps its own A and B:

    tie = 1     one core R for all sites
    tie = 2     one for all sites whose names end alike, such as all queries

The gradient of a shared core is the sum of its sites' gradients. TinyLoRA (2026, arXiv:2602.04118) shares a trained
tensor that is smaller still.
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
class Bra(Family):
    """The family in which only the core R trains.

    Attributes:
        tie: which sites share a core: 0 for none, 1 for all, 2 for those whose names end alike.
    """

    name: ClassVar[str] = "bra"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ("A", "B")
    tie: int = 0

    def __post_init__(self) -> None:
        if self.tie not in (0, 1, 2):
            raise ValueError(f"tie is {self.tie}; it must be 0 (each layer has its own core), 1 (all share one) or 2 "
                             "(those whose names end alike share one)")

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        fixed = [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.A", (site.rank, site.d_in), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, site.rank), trains=False, sites=(site.name,)))]
        sharing: dict[str, list[Site]] = {}
        for site in sites:
            sharing.setdefault(self.core(site), []).append(site)
        return fixed + [TensorSpec(name, (some[0].rank, some[0].rank), sites=tuple(site.name for site in some))
                        for name, some in sharing.items()]

    def core(self, site: Site) -> str:
        """Return the name of the core R that a site uses, which contains what all its sites have in common."""
        if not self.tie:
            return f"{site.name}.R"
        return f"shared.{site.name.rpartition('.')[2]}.{site.rank}.R" if self.tie == 2 else f"shared.{site.rank}.R"

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return LowRankDelta(site.scaling, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                            leaves.linear(self.core(site), site.rank, site.rank),
                            leaves.linear(f"{site.name}.B", site.d_out, site.rank))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.B is not None, "a start without B is refused earlier"
        return {f"{site.name}.A": bases.A, f"{site.name}.B": bases.B,
                self.core(site): torch.zeros(site.rank, site.rank)}

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        B, R = state[f"{site.name}.B"].astype(np.float64), state[self.core(site)]
        return LowRank(B=B @ R, A=state[f"{site.name}.A"])


FAMILY = Bra
