"""FedAvg of DoRA: train both factors and the lengths of the weight's rows, and average each of them separately.

Liu et al., ICML 2024, arXiv:2402.09353.

    server        sends A, B, e
    client k      trains A_k, B_k, e_k in diag((‖W0‖ + e) / ‖W0 + s·B·A‖) (W0 + s·B·A), uploads them
    server        A ← Σ p_k A_k,   B ← Σ p_k B_k,   e ← Σ p_k e_k

The average is not exact: neither the product of the factors nor the division by the lengths of the changed rows is
linear. Private runs are possible, because these lengths depend on no record, but the noises of A and B meet in the
product and in the lengths. `dora-magnitudes` trains the lengths alone, and is exact.
"""

from __future__ import annotations

from ..base import FederatedLoRA
from ..recipe import Preset, Recipe

RECIPE = Recipe(
    family="dora", start="kaiming",
    private=Preset.private(1, 10.0, 1.7e-2, clip_norm=6.0, head_scale=3.5), open=Preset.open(8, 16.0, 1.2e-3))


class DoRA(FederatedLoRA):
    """The DoRA strategy: it averages both factors and the change of each row's length."""

    recipe = RECIPE
