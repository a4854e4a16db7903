"""FFA-LoRA: freeze A, train and average B alone.

Sun et al., ICLR 2024, arXiv:2403.12313.

    server        draws A once (Kaiming, or with orthonormal rows: the control for FedSVD); B = 0
    server        sends B, and A to those that do not hold it
    client k      trains B_k, uploads it
    server        B ← Σ p_k B_k

Exact: (Σ p_k B_k) A = Σ p_k (B_k A). Privacy noise enters the update linearly.
"""

from __future__ import annotations

from fedlora.plan import Released, Tensors

from .base import FederatedLoRA


class FFALoRA(FederatedLoRA):
    """Average B; A never changes."""

    family = "frozen-a"
    linear = True
    exact = True

    def server_step(self, mean: Released, frozen: Tensors, server_round: int) -> Tensors:
        return {**frozen, **mean}
