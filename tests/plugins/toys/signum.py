"""The sign of the momentum: every value moves by the server's learning rate.

Bernstein et al., ICML 2018, arXiv:1802.04434.

    m ← β₁ m + (1 − β₁) Δ;   x ← x + η sign(m)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora_strategies.server_optimizers._elementwise import Elementwise


@dataclass(frozen=True)
class Signum(Elementwise):
    """Memory: m, a first moment of each trained tensor.

    Attributes:
        beta1: how much of the last rounds stays in m.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    moments: ClassVar[Mapping[str, int]] = {"m": 1}

    @override
    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        m = self.beta1 * moments["m"] + (1 - self.beta1) * gradient
        return np.sign(m), {"m": m}


OPTIMIZER = Signum
