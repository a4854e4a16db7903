"""Signum at the server: move every value by the learning rate along the sign of its momentum.

Bernstein et al., ICML 2018, arXiv:1802.04434.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora_strategies.server_optimizers._elementwise import Elementwise


@dataclass(frozen=True)
class Signum(Elementwise):
    """The Signum optimizer.

    Attributes:
        beta1: The share of the momentum that remains after a round.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    moments: ClassVar[Mapping[str, int]] = {"m": 1}

    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        m = self.beta1 * moments["m"] + (1 - self.beta1) * gradient
        return np.sign(m), {"m": m}


OPTIMIZER = Signum
