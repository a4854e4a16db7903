"""FedAvg of LoRA (FedIT): train both factors A and B, and average each of them separately.

Zhang et al., ICASSP 2024, arXiv:2305.05644.

    server        sends A, B
    client k      trains A_k, B_k on its data, uploads both
    server        A ← Σ p_k A_k,   B ← Σ p_k B_k

The average is not exact: (Σ p_k B_k)(Σ p_k A_k) ≠ Σ p_k B_k A_k. This is the baseline that the other strategies improve
on. Under privacy, the product multiplies the noise of both factors.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="lora", start="kaiming",
    private=Preset.private(1, 10.0, 1.7e-2, clip_norm=6.0, head_scale=3.5), open=Preset.open(8, 16.0, 1.2e-3))


class FedAvgLoRA(FederatedLoRA):
    """The FedAvg strategy for LoRA: it averages both factors."""

    recipe = RECIPE
