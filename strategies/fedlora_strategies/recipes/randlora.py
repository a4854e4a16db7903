"""FedAvg of RandLoRA: train diagonals between random factors, which together reach the full rank of the weight.

Albert et al., ICLR 2025, arXiv:2502.00987.

    server        draws A and B_1 … B_N for each size of weight; λ = 0, γ = 1 / the larger of N and the smaller side
    server        sends λ, γ, and A, B to clients that do not hold them
    client k      trains λ_k, γ_k in ΔW = s · Σ_j B_j diag(λ_kj) A diag(γ_kj), uploads both
    server        λ ← Σ p_k λ_k,   γ ← Σ p_k γ_k

The average is not exact, because ΔW has products of λ and γ. With `--family-options gamma=0`, γ is frozen at random
signs of that size. λ alone is trained and sent, about as many values as the weight's smaller side, and the average is
exact. Private runs need that option. The exported adapter is LoRA of full rank: at least as large as the weights that
it changes.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="randlora", start="none",
    private=Preset.private(32, 100.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(32, 128.0, 1e-3))


class RandLoRA(FederatedLoRA):
    """The RandLoRA strategy: it averages both diagonals."""

    recipe = RECIPE
