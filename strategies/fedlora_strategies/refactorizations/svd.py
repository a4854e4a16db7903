"""Thin SVD of B A: orthonormal rows of A, orthogonal columns of B, the same product.

Lee et al., FedSVD, NeurIPS 2025, arXiv:2505.12805.

    U, Σ, Vᵀ ← thin SVD of B A;   B' ← U Σ,   A' ← Vᵀ

For an optimiser at the server the coordinates change by M = A A'ᵀ, (r, r): A = M A' as long as A' stays inside row(A),
so that whatever was a direction of B, pseudo-gradients and their averages too, is that direction times M. Adam's first
moments are rotated by M exactly; its second moments, of single values, are rotated by M's squares
(`server_optimizers`). Beginning anew each round would leave Adam with the sign of one noised round. Where A trains too,
its memory begins anew: it is refactorised from the left, and by a product that grows with B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedlora.adapters import AdapterLayout
from fedlora.algebra import Factors, reorthogonalize
from fedlora.plan import Tensors

from . import Refactored


@dataclass(frozen=True)
class Svd:
    """Attributes:
    warmup: rounds at the start after which nothing is refactorised.
    period: from then on, refactorise after every `period`-th round (paper: 1).
    """

    period: int = 1
    warmup: int = 0
    refreshes_frozen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.period < 1:
            raise ValueError(f"warmup is {self.warmup} and period is {self.period}; warmup must be at least 0, "
                             "period 1")

    def check(self, layout: AdapterLayout) -> None:
        factors = [spec for spec in layout.state if spec.group == "adapter"]
        if other := [spec.name for spec in factors if not spec.name.endswith((".A", ".B"))]:
            raise ValueError(f"svd refactorises B A, and adapters of the family {layout.family.name!r} have "
                             f"{other[0]!r} too; leave it out of the recipe, or choose the family lora or frozen-a")
        sides = [side for spec in factors for side in spec.shape]
        if min(sides, default=layout.rank) < layout.rank:
            raise ValueError(f"rank {layout.rank} exceeds the smaller side of an adapted layer, {min(sides)}: A cannot "
                             "have orthonormal rows. Choose a smaller --rank")

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        return {}

    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int) -> Refactored:
        if round <= self.warmup or (round - self.warmup) % self.period:
            return Refactored(state, own)
        after: dict[str, np.ndarray] = dict(state)
        factors: dict[str, np.ndarray | None] = {}
        for module in layout.modules:
            after |= refactorise(state, module)
            A, rows = (tensors[f"{module}.A"].astype(np.float64) for tensors in (state, after))
            if not np.array_equal(A, rows):  # B = 0 leaves them
                factors |= {f"{module}.B": A @ rows.T, f"{module}.A": None}
        trained = {spec.name for spec in layout.trained}
        return Refactored(after, own, {name: factor for name, factor in factors.items() if name in trained})


def refactorise(state: Tensors, module: str) -> Tensors:
    """The module's B (d_out, r) and A (r, d_in) with the same product and orthonormal rows of A; B = 0 changes nothing.

    Computed in float64, returned in the state's dtype.
    """
    B, A = state[f"{module}.B"], state[f"{module}.A"]
    factors = reorthogonalize(Factors(B=torch.tensor(B, dtype=torch.float64), A=torch.tensor(A, dtype=torch.float64)))
    return {f"{module}.B": factors.B.numpy().astype(B.dtype, order="C"),
            f"{module}.A": factors.A.numpy().astype(A.dtype, order="C")}


REFACTORIZATION = Svd
