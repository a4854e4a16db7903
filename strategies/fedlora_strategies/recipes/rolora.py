"""RoLoRA: train and average B in odd rounds and A in even ones.

Chen et al., NeurIPS 2025, arXiv:2502.01755.

    server        draws A; B = 0
    server        sends A, B
    client k      trains B_k in an odd round, A_k in an even one, and uploads it
    server        B ← Σ p_k B_k  or  A ← Σ p_k A_k

Both factors are learned, and every average is exact: Σ p_k (B_k A) = (Σ p_k B_k) A while A is the same for all, and
likewise for A. Privacy noise enters each round's update linearly. An upload is half of FedAvg-LoRA's where a layer has
as many inputs as outputs.

The default values are FedAvg-LoRA's, and were not tuned. A round trains one factor alone, so a short run is hardly
begun: give it 20 rounds.
"""

from __future__ import annotations

from dataclasses import replace

from ..base import FederatedLoRA
from ..schedules.one_factor import OneFactor
from . import fedavg_lora

RECIPE = replace(fedavg_lora.RECIPE, schedule=OneFactor())


class RoLoRA(FederatedLoRA):
    """The RoLoRA strategy: it averages B and A in turn."""

    recipe = RECIPE
