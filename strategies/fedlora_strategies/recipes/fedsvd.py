"""FedSVD: train B alone, re-orthogonalise A between rounds.

Lee et al., NeurIPS 2025, arXiv:2505.12805.

    server        draws A; B = 0
    server        sends B, and A whenever it changed
    client k      trains B_k, uploads it
    server        B ← Σ p_k B_k
                  U, Σ, Vᵀ ← thin SVD of B A;   B ← U Σ,   A ← Vᵀ

Exact: A is one and the same for all during a round, and the refactorisation leaves B A as it is. It turns A into the
right singular vectors of the update learned so far. It sees nothing but the mean of (noised) uploads: post-processing.
Clients start every round with a fresh optimiser, which has no state to rotate; one at the server is rotated, see
`refactorizations.svd`.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe
from ..refactorizations.svd import Svd

RECIPE = Recipe(
    family="frozen-a", start="orthonormal", refactorization=Svd(period=1, warmup=0),
    private=Preset.private(2, 5.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(8, 16.0, 4e-3))


class FedSVD(FederatedLoRA):
    """Average B, then refactorise B A."""

    recipe = RECIPE
