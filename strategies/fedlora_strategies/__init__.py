"""Flower strategies for federated LoRA, one file of `recipes/` for each paper.

A strategy is a recipe: an adapter family plus a server step. It works with `strategy.start(grid, …)` in any Flower
ServerApp. `FedSVD.for_model(…)` makes everything that such a ServerApp needs.
"""

from .base import Diverged, FederatedLoRA, Traffic
from .lookup import strategy_class
from .recipe import Preset, Recipe
from .recipes.bone import Bone
from .recipes.dora import DoRA
from .recipes.dora_frozen_a import DoRAFrozenA
from .recipes.dora_magnitudes import DoRAMagnitudes
from .recipes.fed_sb import FedSB
from .recipes.fedavg_lora import FedAvgLoRA
from .recipes.fedex_lora import FedExLoRA
from .recipes.fedsvd import FedSVD
from .recipes.fedsvd_refresh import FedSVDRefresh
from .recipes.ffa_lora import FFALoRA
from .recipes.flexlora import FlexLoRA
from .recipes.flylora import FlyLoRA
from .recipes.loldu import LoLDU
from .recipes.pissa import PiSSA
from .recipes.randlora import RandLoRA
from .recipes.rolora import RoLoRA
from .recipes.salt import SALT
from .recipes.switch_lora import SwitchLoRA

__all__ = ["SALT", "Bone", "Diverged", "DoRA", "DoRAFrozenA", "DoRAMagnitudes", "FFALoRA", "FedAvgLoRA", "FedExLoRA",
           "FedSB", "FedSVD", "FedSVDRefresh", "FederatedLoRA", "FlexLoRA", "FlyLoRA", "LoLDU", "PiSSA", "Preset",
           "RandLoRA", "Recipe", "RoLoRA", "SwitchLoRA", "Traffic", "strategy_class"]
