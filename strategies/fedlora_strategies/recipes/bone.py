"""Bone, in its form bat: train and average a block b for each row of blocks of the weight.

Kang and Yin (MiSS, formerly Bone), 2024, arXiv:2409.15371.

    server        b = 0
    server        sends b
    client k      trains b_k in ΔW = s · (W_oc + I) b_o for each block (o, c) of W0, uploads it
    server        b ← Σ p_k b_k

The average is exact, because W0 is the same for all and the update is linear in b. An upload has r values for each
output of a target, as with FFA-LoRA, but the update has full rank. r must divide both sides of every target. Nothing
frozen is sent, so there is no start to choose. The exported adapter is one of PEFT's type MiSS.

A small rank is slow: at r = 8, a round of MiniLM takes at least five times as long on a CPU as at the default, 32.

The other forms of the paper are `ffa-lora` and `fed-sb` with the start `block`. The default values were not tuned.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="bat", start="none",
    private=Preset.private(32, 5.6, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(64, 10.7, 2e-2))


class Bone(FederatedLoRA):
    """The strategy for Bone: it averages the blocks b."""

    recipe = RECIPE
