"""FedSVD with new directions: after each SVD, the weakest rows of A are exchanged for random ones.

FedSVD is of Lee et al., NeurIPS 2025, arXiv:2505.12805; the exchange is not in that paper.

    server        sends A, B, and the stack D C
    client k      trains B_k with ΔW = s·(B A + D C), uploads it
    server        B ← Σ p_k B_k
                  U, Σ, Vᵀ ← thin SVD of B A;   B ← U Σ,   A ← Vᵀ
                  the weakest rows and their columns: D C ← D C + B_J A_J,   B_J ← 0,   A_J ← random

FedSVD's A cannot leave the row space that it began with. Here `refresh` rows of each layer do after each SVD (default:
1; `--strategy-options refresh=2`), and what they have learned stays in the stack. Every average is exact, and neither
the SVD nor the exchange changes the model.

The default values are FedSVD's, and were not tuned.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Recipe
from ..refactorizations.svd_refresh import SvdRefresh
from ..schedules.b_alone import BAlone
from . import fedsvd

RECIPE = Recipe(family="lora-stack", start="orthonormal", refactorization=SvdRefresh(), schedule=BAlone(),
                private=fedsvd.RECIPE.private, open=fedsvd.RECIPE.open)


class FedSVDRefresh(FederatedLoRA):
    """The FedSVD strategy with new rows of A after each refactorization."""

    recipe = RECIPE
