"""PiSSA in a federation: both factors start from the weight's leading singular vectors, and their changes are averaged.

Meng et al., NeurIPS 2024, arXiv:2404.02948.

    server        A = √σ Vᵀ, B = U √σ of the r leading singular triples of W0 (`--init weight-scaled`); dA = dB = 0
    server        sends dA, dB, and A, B to clients that do not hold them
    client k      trains dA_k, dB_k in ΔW = s · ((B + dB_k)(A + dA_k) − B A), uploads both
    server        dA ← Σ p_k dA_k,   dB ← Σ p_k dB_k

PiSSA takes s B A off the weight and trains what is left in its place. Here the weight stays, and B A is taken off the
update, which is the same. s = 1, as in the paper, by alpha = rank. The average is not exact, as that of FedAvg of LoRA
is not, and under privacy the product multiplies the noise of both factors. The exported adapter is LoRA of rank 2r.

With a start from gradients in place of the weight, LoRA-GA (arXiv:2407.05000) trains in the same way.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="lora-offset", start="weight-scaled",
    private=Preset.private(1, 1.0, 3e-2, clip_norm=3.0, head_scale=2.0), open=Preset.open(8, 8.0, 5e-4))


class PiSSA(FederatedLoRA):
    """The PiSSA strategy: it averages the changes of both factors."""

    recipe = RECIPE
