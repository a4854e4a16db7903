"""FedSVD: train B alone, re-orthogonalise A between rounds.

Lee et al., NeurIPS 2025, arXiv:2505.12805.

    server        draws A; B = 0
    server        sends B, and A whenever it changed
    client k      trains B_k, uploads it
    server        B ← Σ p_k B_k
                  U, Σ, Vᵀ ← thin SVD of B A;   B ← U Σ,   A ← Vᵀ

Exact: A is one and the same for all during a round, and the refactorisation leaves B A as it is. It turns A into the
right singular vectors of the update learned so far. It sees nothing but the mean of (noised) uploads: post-processing.
Clients start every round with a fresh optimiser, so there is no optimiser state to rotate.
"""

from __future__ import annotations

import torch

from fedlora.adapters import AdapterLayout
from fedlora.algebra import Factors, reorthogonalize
from fedlora.plan import Released, RunPlan, Tensors

from .base import FederatedLoRA


class FedSVD(FederatedLoRA):
    """Average B, then refactorise B A.

    Args:
        warmup: rounds at the start after which nothing is refactorised.
        period: from then on, refactorise after every `period`-th round (paper: 1).
    """

    family = "frozen-a"
    linear = True
    exact = True
    refreshes_frozen = True

    def __init__(self, plan: RunPlan, layout: AdapterLayout, *, warmup: int = 0, period: int = 1,
                 min_nodes: int = 1) -> None:
        super().__init__(plan, layout, min_nodes=min_nodes)
        if warmup < 0 or period < 1:
            raise ValueError(f"warmup is {warmup} and period is {period}; warmup must be at least 0, period 1")
        sides = [side for spec in layout.state if spec.group == "adapter" for side in spec.shape]
        if min(sides, default=layout.rank) < layout.rank:
            raise ValueError(f"rank {layout.rank} exceeds the smaller side of an adapted layer, {min(sides)}: A cannot "
                             "have orthonormal rows. Choose a smaller --rank")
        self.warmup, self.period = warmup, period

    def server_step(self, mean: Released, frozen: Tensors, server_round: int) -> Tensors:
        state = {**frozen, **mean}
        if server_round <= self.warmup or (server_round - self.warmup) % self.period:
            return state
        for module in self.layout.modules:
            state |= refactorise(state, module)
        return state


def refactorise(state: Tensors, module: str) -> Tensors:
    """The module's B (d_out, r) and A (r, d_in) with the same product and orthonormal rows of A; B = 0 changes nothing.

    Computed in float64, returned in the state's dtype.
    """
    B, A = state[f"{module}.B"], state[f"{module}.A"]
    factors = reorthogonalize(Factors(B=torch.tensor(B, dtype=torch.float64), A=torch.tensor(A, dtype=torch.float64)))
    return {f"{module}.B": factors.B.numpy().astype(B.dtype, order="C"),
            f"{module}.A": factors.A.numpy().astype(A.dtype, order="C")}
