"""FFA-LoRA: freeze A at its random start, train and average B alone.

Sun et al., ICLR 2024, arXiv:2403.12313.

    server        draws A once (Kaiming, or with orthonormal rows: the control for FedSVD); B = 0
    server        sends B, and A to clients that do not hold it
    client k      trains B_k, uploads it
    server        B ← Σ p_k B_k

The average is exact: (Σ p_k B_k) A = Σ p_k (B_k A). Privacy noise enters the update linearly.

With another `--reduction` than the mean, the result is not exactly a mean of models any more.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="frozen-a", start="kaiming",
    private=Preset.private(2, 8.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(8, 16.0, 6e-3),
    presets_of={"orthonormal": "fedsvd"})  # so that the two differ in nothing but the refactorization


class FFALoRA(FederatedLoRA):
    """The FFA-LoRA strategy: it averages B. A never changes."""

    recipe = RECIPE
