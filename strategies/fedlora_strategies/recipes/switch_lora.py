"""SwitchLoRA between rounds: train and average B alone, and exchange the rows of A for new ones every few rounds.

After Zhou, Wang and Xu, 2024, arXiv:2406.06564, a method for pre-training.

    server        sends A, B, and the stack D C whenever it changed
    client k      trains B_k with ΔW = s·(B A + D C), uploads it
    server        B ← Σ p_k B_k
                  after every 5th round: D C ← D C + B A,   A ← new random rows,   B ← 0

Every average is exact, and an exchange does not change the model. The rank of ΔW grows by r with each exchange, where
FFA-LoRA and FedSVD stay in one row space of rank r. `--strategy-options interval=…,rows=…`.

Left out: exchanges of single vectors in every step of training, columns of B among them, and their falling rate; pools
of candidates with the paper's standard deviations (new rows have the length of the old ones here); and the steps for
which a new vector's counterpart is frozen (here B trains alone, and an optimizer at the server forgets the columns that
were exchanged). Under privacy the noise of all rounds stays in the stack, in more directions than FFA-LoRA's.

The default values are FFA-LoRA's, and were not tuned.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Recipe
from ..refactorizations.exchange import Exchange
from ..schedules.b_alone import BAlone
from . import ffa_lora

RECIPE = Recipe(family="lora-stack", start="kaiming", refactorization=Exchange(), schedule=BAlone(),
                private=ffa_lora.RECIPE.private, open=ffa_lora.RECIPE.open)


class SwitchLoRA(FederatedLoRA):
    """The SwitchLoRA strategy: it averages B, and exchanges the rows of A between rounds."""

    recipe = RECIPE
