"""FedSVD: train and average B alone, and re-orthogonalise A by an SVD of B A between rounds.

Lee et al., NeurIPS 2025, arXiv:2505.12805.

    server        draws A; B = 0
    server        sends B, and A whenever it changed
    client k      trains B_k, uploads it
    server        B ← Σ p_k B_k
                  U, Σ, Vᵀ ← thin SVD of B A;   B ← U Σ,   A ← Vᵀ

The average is exact: during a round all clients have the same A, and the refactorization does not change B A. It makes
A the right singular vectors of the update learned so far. It uses nothing but the mean of the (noised) uploads, so it
is post-processing. Clients start every round with a fresh optimizer, which has no memory to rotate. The memory of a
server optimizer is rotated (`refactorizations.svd`).

With another `--reduction` than the mean, the result is not exactly a mean of models any more. The rows of A are
orthonormal, so norms and distances of B are still those of B A; but a median or a trimmed mean of B depends on the
coordinates, which every refactorization turns.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe
from ..refactorizations.svd import Svd

RECIPE = Recipe(
    family="frozen-a", start="orthonormal", refactorization=Svd(period=1, warmup=0),
    private=Preset.private(2, 5.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(8, 16.0, 4e-3))


class FedSVD(FederatedLoRA):
    """The FedSVD strategy: it averages B, then refactorizes B A."""

    recipe = RECIPE
