"""Low-rank adapters beside a frozen stack that the server fills: ΔW = s·(B·A + D·C).

The server keeps in the stack what no longer trains: rows of A that were exchanged, with their columns of B, or what an
average of the factors leaves out (`fedlora_strategies.stack`). The base weight is never written.

    A   (r, d_in)    trained, from the start's bases
    B   (d_out, r)   trained, starts at 0
    C   (q, d_in)    frozen during a round, starts at 0
    D   (d_out, q)   frozen during a round, starts at 0

A schedule may have B train alone; the update is linear then. Without the stack this is the family `lora`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.families.lora import Lora, LowRankDelta
from fedlora.adapters.family import Bases, Delta, Draw, Leaves, Site, TensorSpec
from fedlora.adapters.updates import LowRank
from fedlora.plan import Tensors


class StackedDelta(LowRankDelta):
    """The update s·(B(A x) + D(C x))."""

    def __init__(self, scaling: float, A: nn.Module, B: nn.Module, C: nn.Module, D: nn.Module) -> None:
        super().__init__(scaling, A, B)
        self.stack = LowRankDelta(scaling, C, D)

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        total: torch.Tensor = super().forward(x, output, base) + self.stack(x, output, base)
        return total


@dataclass(frozen=True)
class LoraStack(Lora):
    """The family with both factors trained and a stack of a fixed number of slots.

    Attributes:
        slots: q, the rank of the stack; a layer has no more than min(d_out, d_in), with which the stack can hold every
            update. 0 stands for that number.

    Raises:
        ValueError: `slots` is negative.
    """

    name: ClassVar[str] = "lora-stack"
    slots: int = 0

    def __post_init__(self) -> None:
        if self.slots < 0:
            raise ValueError(f"slots is {self.slots}; it must be positive, or 0 for as many as a layer can use")

    def slots_of(self, site: Site) -> int:
        """Return the number of slots of a site's stack."""
        most = min(site.d_out, site.d_in)
        return min(self.slots or most, most)

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [*super().specs(sites), *(spec for site in sites for spec in (
            TensorSpec(f"{site.name}.C", (self.slots_of(site), site.d_in), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.D", (site.d_out, self.slots_of(site)), trains=False, sites=(site.name,))))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        q = self.slots_of(site)
        shapes = {"A": (site.rank, site.d_in), "B": (site.d_out, site.rank), "C": (q, site.d_in), "D": (site.d_out, q)}
        return StackedDelta(site.scaling, *(leaves.linear(f"{site.name}.{of}", *shape) for of, shape in shapes.items()))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        q = self.slots_of(site)
        return {**super().initial(site, bases, draw), f"{site.name}.C": torch.zeros(q, site.d_in),
                f"{site.name}.D": torch.zeros(site.d_out, q)}

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        """Return the factors [B D] and [A; C], without the slots that are empty."""
        B, A, D, C = (state[f"{site.name}.{factor}"] for factor in "BADC")
        used = D.any(axis=0) & C.any(axis=1)
        return LowRank(B=np.hstack([B, D[:, used]]), A=np.vstack([A, C[used]]))


FAMILY = LoraStack
