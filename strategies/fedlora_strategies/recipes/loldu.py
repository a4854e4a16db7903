"""LoLDU: decompose the frozen weight as P·L·D·U, train and average the first r values of the diagonal D alone.

Shi et al., 2024, arXiv:2410.13618.

    server        A = first rows of U, B = first columns of P·L (`--init lu`); e = 0
    server        sends e, and A, B to clients that do not hold them
    client k      trains e_k in ΔW = s · B diag(e_k) A, uploads it
    server        e ← Σ p_k e_k

The average is exact: B diag(Σ p_k e_k) A = Σ p_k (B diag(e_k) A). An upload has r values per target, whatever the width
of the model. The factor on the whole update, which the paper trains too, is left out: its product with e would not
average exactly.

With `--init orthonormal`, A and B are random, as in RandLoRA and S2-LoRA; with `--init weight` they are the singular
vectors of the weight, as in SALT. Their products B_j A_j have norm 1. Those of the LU decomposition are about 40 times
as long in a 384 × 384 weight, and the preset's scale is chosen accordingly: give such starts `--alpha 64`.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="diagonal", start="lu",
    private=Preset.private(16, 5.6, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(32, 5.6, 2e-2))


class LoLDU(FederatedLoRA):
    """The LoLDU strategy: it averages the diagonal between A and B, which never change."""

    recipe = RECIPE
