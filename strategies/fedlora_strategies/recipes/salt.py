"""SALT: train and average the leading singular values of the weight, and a low-rank change of the rest.

Elsayed et al., 2025, arXiv:2503.16055, without what is not linear.

    server        A, B = leading singular vectors of W0 (`--init weight`); P random, orthogonal to B; e = 0, Y = 0
    server        sends e, Y, and A, B, P to clients that do not hold them
    client k      trains e_k, Y_k in ΔW = s · (B diag(e_k) A + P Y_k (I − AᵀA)), uploads them
    server        e ← Σ p_k e_k,   Y ← Σ p_k Y_k

The average is exact. The rank counts the leading values and the rest; `--family-options top=K` says how many are
leading, which are half of it otherwise. The paper trains two numbers for each leading value, a factor and a shift,
whose sum is one change of that value, and cuts the changed values at 0, which would not average exactly.

The default values were not tuned.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="salt", start="weight",
    private=Preset.private(4, 9.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(32, 26.0, 2e-2))


class SALT(FederatedLoRA):
    """The SALT strategy: it averages the change of the leading singular values, and the factor Y of the rest."""

    recipe = RECIPE
