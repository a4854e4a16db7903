"""DoRA's magnitudes beside a low-rank adapter whose A is frozen: train and average both.

Liu et al. (DoRA), ICML 2024, arXiv:2402.09353; Sun et al. (FFA-LoRA), ICLR 2024, arXiv:2403.12313. The combination is
ours.

    server        V = 1 / the length of each row of W0; draws A; e = 0, B = 0
    server        sends e, B, and V, A to clients that do not hold them
    client k      trains e_k, B_k in ΔW = s · (diag(e_k) diag(V) W0 + B_k A), uploads them
    server        e ← Σ p_k e_k,   B ← Σ p_k B_k

The average is exact. In DoRA itself, B A is within the norm that the rows are divided by, which is not linear. The
exported adapter is a DoRA adapter of PEFT of rank r.

The default values are FedSVD's, and were not tuned.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Recipe
from . import fedsvd

RECIPE = Recipe(family="row-scale-frozen-a", start="row-norms", private=fedsvd.RECIPE.private, open=fedsvd.RECIPE.open)


class DoRAFrozenA(FederatedLoRA):
    """The strategy for DoRA's magnitudes beside FFA-LoRA: it averages e and B."""

    recipe = RECIPE
