"""Fed-SB: freeze the outer factors A and B, train and average the r × r matrix R between them.

Singhal et al., 2025, arXiv:2502.15436.

    server        fixes A, B with orthonormal rows and columns, by the start that `--init` names; R = 0
    server        sends R, and A, B to clients that do not hold them
    client k      trains R_k in ΔW = s · B R_k A, uploads it
    server        R ← Σ p_k R_k

The average is exact: B (Σ p_k R_k) A = Σ p_k (B R_k A). Only r² values per target are sent, whatever the width of the
model.

The paper takes A, B and R from the first gradient on private data (LoRA-SB), as `--init lora-sb-clients` takes A and B.
Under privacy this is a release of its own: there a start does not depend on private data, or is noised and charged
(`fedlora_strategies.private_start`).

With another `--reduction` than the mean, the result is not exactly a mean of models any more. Where A and B have
orthonormal rows and columns, norms and distances of R are still those of B R A.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="bra", start="orthonormal",
    private=Preset.private(16, 64.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(32, 64.0, 2e-2))


class FedSB(FederatedLoRA):
    """The Fed-SB strategy: it averages R. A and B never change."""

    recipe = RECIPE
