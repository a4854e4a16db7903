"""Train the family with a frozen B and average what comes back."""

from __future__ import annotations

from fedlora_strategies.recipe import Preset, Recipe

RECIPE = Recipe(family="frozen-b", start="cosines", private=Preset.private(4, 8.0, 3e-2, clip_norm=3.0, head_scale=2.0),
                open=Preset.open(4, 8.0, 2e-2))
