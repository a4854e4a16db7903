"""Low-rank adapters whose A is frozen, of whose rows each token uses those that fit it best: linear in B.

Zou et al. (FlyLoRA), NeurIPS 2025, arXiv:2510.08396.

    A   (r, d_in)    frozen, from the start's bases; sparse and random in the paper (start `sparse`)
    B   (d_out, r)   trained, starts at 0

    y = W0 x + s·B·(mask * A x),    mask = 1 for the k largest |A x| of the token, and 0 for the others

For r ≤ k this is the family `frozen-a`. For larger r, what is added is no fixed matrix times x. So it can be neither
merged into the weight nor held by PEFT, and it is handed on in our own form (`fedlora.adapters.saved`).

The paper shifts A x by numbers that grow where rows are used less than others. They would count the tokens of private
texts, and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.families.frozen_a import FrozenA
from fedlora.adapters.family import Delta, Leaves, Site
from fedlora.adapters.updates import LowRank
from fedlora.plan import Tensors


class RoutedDelta(Delta):
    """The update s·B(mask * A x), where the mask keeps the k largest of a token's |A x|."""

    def __init__(self, scaling: float, A: nn.Module, B: nn.Module, k: int) -> None:
        super().__init__()
        self.scaling, self.k = scaling, k
        self.A, self.B = A, B

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        fits = self.A(x)
        chosen = fits.detach().abs().topk(self.k, dim=-1).indices
        added: torch.Tensor = self.B(fits * torch.zeros_like(fits).scatter(-1, chosen, 1.0))
        return added * self.scaling


@dataclass(frozen=True)
class FlyLora(FrozenA):
    """The family in which only the factor B trains, and each token uses k of its columns.

    Attributes:
        k: how many rows of A each token uses; all of them where the rank is not larger.
    """

    name: ClassVar[str] = "flylora"
    narrows: ClassVar[bool] = False
    k: int = 8

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; each token must use at least 1 row of A")

    @override
    def by_token(self, site: Site) -> bool:
        return self.k < site.rank

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        if not self.by_token(site):
            return super().build(site, leaves)
        return RoutedDelta(site.scaling, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                           leaves.linear(f"{site.name}.B", site.d_out, site.rank), self.k)

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        if self.by_token(site):
            raise ValueError(f"the adapter family flylora chooses {self.k} of {site.rank} rows of A for each token, so "
                             "that no weight and no adapter of PEFT can hold what it adds. Hand on the adapter in its "
                             f"own form; or train with --family-options k={site.rank}, where nothing is chosen")
        return super().update(state, site)


FAMILY = FlyLora
