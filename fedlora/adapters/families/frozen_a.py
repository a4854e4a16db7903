"""Low-rank adapters with A frozen: ΔW = s·B·A, linear in B.

Sun et al. (FFA-LoRA), ICLR 2024, arXiv:2403.12313; Lee et al. (FedSVD), NeurIPS 2025, arXiv:2505.12805.

    A   (r, d_in)    frozen during a round, from the start's bases
    B   (d_out, r)   trained, starts at 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapters.families.lora import Lora


@dataclass(frozen=True)
class FrozenA(Lora):
    """The family in which only the factor B trains."""

    name: ClassVar[str] = "frozen-a"
    exact: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    trains_A: ClassVar[bool] = False


FAMILY = FrozenA
