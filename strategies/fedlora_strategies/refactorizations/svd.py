"""Thin SVD of B A: give A orthonormal rows and B orthogonal columns, with the same product.

Lee et al., FedSVD, NeurIPS 2025, arXiv:2505.12805.

    U, Σ, Vᵀ ← thin SVD of B A;   B' ← U Σ,   A' ← Vᵀ

For a server optimizer, the coordinates change by M = A A'ᵀ, (r, r). As long as the rows of A' lie in the row space of
A, A = M A', so every direction of B, including pseudo-gradients and their averages, becomes that direction times M.
Adam's first moments are rotated by M exactly. Its second moments belong to single values; they are rotated by the
squares of M (`server_optimizers`). If the memory began anew each round, Adam would be left with the signs of one noised
round. If A trains too, its memory begins anew: A is multiplied from the left, by a matrix that grows with B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.algebra import Factors, reorthogonalize
from fedlora.plan import Tensors

from . import Refactored, Refactorization


@dataclass(frozen=True)
class Svd(Refactorization):
    """The thin SVD, applied after every `period`-th round.

    Attributes:
        period: The number of rounds from one refactorization to the next (paper: 1).
        warmup: The number of rounds at the start that are not counted and not followed by a refactorization.

    Raises:
        ValueError: `warmup` is negative, or `period` is below 1.
    """

    period: int = 1
    warmup: int = 0
    refreshes_frozen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.period < 1:
            raise ValueError(f"warmup is {self.warmup} and period is {self.period}; warmup must be at least 0, and "
                             "period at least 1")

    @override
    def check(self, layout: AdapterLayout) -> None:
        factors = [spec for spec in layout.state if spec.group == "adapter"]
        if other := [spec.name for spec in factors if not spec.name.endswith((".A", ".B"))]:
            raise ValueError(f"svd refactorizes B A, and adapters of the family {layout.family.name!r} have "
                             f"{other[0]!r} too; leave it out of the recipe, or choose the family lora or frozen-a")
        sides = [side for spec in factors for side in spec.shape]
        if min(sides, default=layout.rank) < layout.rank:
            raise ValueError(f"rank {layout.rank} exceeds the smaller side of an adapted layer, {min(sides)}: A cannot "
                             "have orthonormal rows. Choose a smaller --rank")

    @override
    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        return {}

    @override
    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
              rng: np.random.Generator) -> Refactored:
        if not self._due(round):
            return Refactored(state, own)
        after: dict[str, np.ndarray] = dict(state)
        factors: dict[str, np.ndarray | None] = {}
        for module in layout.modules:
            after |= refactorize(state, module)
            A, rows = (tensors[f"{module}.A"].astype(np.float64) for tensors in (state, after))
            if not np.array_equal(A, rows):  # they are equal where B = 0
                factors |= {f"{module}.B": A @ rows.T, f"{module}.A": None}
        trained = {spec.name for spec in layout.trained}
        return Refactored(after, own, {name: factor for name, factor in factors.items() if name in trained})

    def _due(self, round: int) -> bool:
        return round > self.warmup and (round - self.warmup) % self.period == 0


def refactorize(state: Tensors, module: str) -> Tensors:
    """Refactorize one module's B (d_out, r) and A (r, d_in), so that A has orthonormal rows and B A stays the same.

    Where B = 0, nothing changes. The computation is in float64.

    Args:
        state: The state.
        module: The module's name.

    Returns:
        The module's new B and A by name, in the state's dtype.
    """
    B, A = state[f"{module}.B"], state[f"{module}.A"]
    factors = reorthogonalize(Factors(B=torch.tensor(B, dtype=torch.float64), A=torch.tensor(A, dtype=torch.float64)))
    return {f"{module}.B": factors.B.numpy().astype(B.dtype, order="C"),
            f"{module}.A": factors.A.numpy().astype(A.dtype, order="C")}


REFACTORIZATION = Svd
