"""Flower strategies for federated LoRA: one paper, one file.

Each is an adapter family plus a server step, and works with `strategy.start(grid, …)` in any Flower ServerApp.
"""

from collections.abc import Mapping

from .base import FederatedLoRA, Traffic
from .fed_sb import FedSB
from .fedavg_lora import FedAvgLoRA
from .fedsvd import FedSVD
from .ffa_lora import FFALoRA

STRATEGY_CLASSES: Mapping[str, type[FederatedLoRA]] = {
    "fedavg-lora": FedAvgLoRA, "ffa-lora": FFALoRA, "fed-sb": FedSB, "fedsvd": FedSVD,
}
"""By the names of `fedlora.plan.STRATEGIES`."""

__all__ = ["STRATEGY_CLASSES", "FFALoRA", "FedAvgLoRA", "FedSB", "FedSVD", "FederatedLoRA", "Traffic"]
