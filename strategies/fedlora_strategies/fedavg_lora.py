"""FedAvg of LoRA factors (FedIT): train and average A and B, each on its own.

Zhang et al., ICASSP 2024, arXiv:2305.05644.

    server        sends A, B
    client k      trains A_k, B_k on its data, uploads both
    server        A ← Σ p_k A_k,   B ← Σ p_k B_k

Not exact: (Σ p_k B_k)(Σ p_k A_k) ≠ Σ p_k B_k A_k. It is the baseline that the other strategies improve on. Under
privacy the noise of both factors meets in the product.
"""

from __future__ import annotations

from fedlora.plan import Released, Tensors

from .base import FederatedLoRA


class FedAvgLoRA(FederatedLoRA):
    """Average both factors."""

    family = "lora"
    linear = True
    exact = False

    def server_step(self, mean: Released, frozen: Tensors, server_round: int) -> Tensors:
        return {**frozen, **mean}
