"""FlyLoRA: freeze a sparse A, of whose rows each token uses the k that fit it best; train and average B alone.

Zou et al., NeurIPS 2025, arXiv:2510.08396.

    server        draws a sparse A once (`--init sparse`); B = 0
    server        sends B, and A to clients that do not hold it
    client k      trains B_k in W0 x + s · B_k (mask * A x), uploads it
    server        B ← Σ p_k B_k

The mask depends on A and x alone, so the average is exact: the mean of the models is the model of the mean for every
token. `--family-options k=8` is the paper's number; a rank of k or less uses every row, as `ffa-lora --init sparse`.
The paper also shifts the choice by how often each row was used. These counts tell of private texts, and are left out.

The update is no matrix, so the adapter cannot be merged and PEFT cannot hold it. It is handed on in our own form.
Privacy noise is added to all of B, while a token trains k of its columns.

The default values were not tuned.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="flylora", start="sparse",
    private=Preset.private(32, 32.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(32, 64.0, 4e-3))


class FlyLoRA(FederatedLoRA):
    """The FlyLoRA strategy: it averages B. A never changes."""

    recipe = RECIPE
