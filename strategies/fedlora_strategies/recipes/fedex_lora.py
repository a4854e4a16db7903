"""FedEx-LoRA: average A and B separately, and keep what the product of the averages lacks in a frozen stack.

Singhal, Ponkshe and Vepakomma, ACL 2025, arXiv:2410.09432.

    server        sends A, B, and the stack D C
    client k      trains A_k, B_k with ΔW = s·(B A + D C), uploads both
    server        A ← Σ p_k A_k,   B ← Σ p_k B_k,   D C ← D C + Σ p_k B_k A_k − B A

The paper adds the residual to the base weight at every client. Here the base never changes, so the residual is kept in
a stack of low rank beside the adapter (`reductions/_residual.py`), which is sent in every round. With min(m, n) slots
the average is exact. The default, 64, is exact for layers that are no larger; elsewhere the stack keeps the best
approximation, and the server tells what is lost: `--family-options slots=N`. It excludes secure aggregation. Under
privacy the residual holds products of two noises, and they add up over the rounds.

The default values are FedAvg-LoRA's, and were not tuned.
"""

from __future__ import annotations

from dataclasses import replace

from ..base import FederatedLoRA
from ..reductions._residual import Residual
from . import fedavg_lora

RECIPE = replace(fedavg_lora.RECIPE, family="lora-stack", reduction=Residual())


class FedExLoRA(FederatedLoRA):
    """The FedEx-LoRA strategy: it averages both factors and keeps the residual of their product."""

    recipe = RECIPE
