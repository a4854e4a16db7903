"""Momentum at the server (FedAvgM): step along a decaying sum of the rounds' mean changes.

Hsu et al., 2019, arXiv:1909.06335; Reddi et al., arXiv:2003.00295, call it FedAvgM too.

    m ← β₁ m + Δ
    x ← x + η m

Along a direction in which all rounds agree, it goes η / (1 − β₁) times as far as the clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from ._elementwise import Elementwise, require


@dataclass(frozen=True)
class Momentum(Elementwise):
    """The momentum optimizer. It remembers m.

    Attributes:
        beta1: β₁, the share of m that remains after a round, in [0, 1).
    """

    beta1: float = 0.9
    moments: ClassVar[Mapping[str, int]] = {"m": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "at least 0 and below 1")

    @override
    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        m = self.beta1 * moments["m"] + gradient
        return m, {"m": m}


OPTIMIZER = Momentum
