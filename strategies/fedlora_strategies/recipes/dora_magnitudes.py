"""DoRA's magnitudes: train and average how long each row of the weight is, and keep the rows' directions.

Liu et al. (DoRA), ICML 2024, arXiv:2402.09353, without the low-rank change of the directions.

    server        V = 1 / the length of each row of W0; e = 0
    server        sends e, and V to clients that do not hold it
    client k      trains e_k in ΔW = s · diag(e_k) diag(V) W0, uploads it
    server        e ← Σ p_k e_k

The average is exact, because the update is linear in e. DoRA itself divides by the length of the changed rows, so that
the mean of its models is not the model of any mean. An upload has one value for each output of a target. `--rank` only
scales the update, by s = alpha / rank. The exported adapter is a DoRA adapter of PEFT whose B is 0.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="row-scale", start="row-norms",
    private=Preset.private(1, 3.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(1, 1.0, 2e-2))


class DoRAMagnitudes(FederatedLoRA):
    """The strategy for DoRA's magnitudes: it averages the change of each row's length."""

    recipe = RECIPE
