"""FlexLoRA: average the products B A of the clients, and cut the mean to the adapter's rank by an SVD.

Bai et al., NeurIPS 2024, arXiv:2402.11505.

    server        sends the first r_k rows of A and columns of B
    client k      trains A_k, B_k on its data, uploads both
    server        B A ← best approximation of rank r of Σ p_k B_k A_k

The ranks r_k ≤ r are those of --client-ranks; a client without one has r. The singular values of B A fall, so that what
client k gets is its best approximation of rank r_k. It is exact up to the singular values beyond r. It excludes secure
aggregation. Left out: the paper's choice of ranks by a client's resources, which the coordinator makes here.

The default values are FedAvg-LoRA's, and were not tuned.
"""

from __future__ import annotations

from dataclasses import replace

from ..base import FederatedLoRA
from ..reductions._products import Products
from . import fedavg_lora

RECIPE = replace(fedavg_lora.RECIPE, reduction=Products())


class FlexLoRA(FederatedLoRA):
    """The FlexLoRA strategy: it averages products of the factors."""

    recipe = RECIPE
