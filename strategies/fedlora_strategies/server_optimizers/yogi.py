r"""Yogi at the server (FedYogi): Adam whose second moment changes in each round by at most a share of that round's Δ².

Reddi et al., ICLR 2021, arXiv:2003.00295, Algorithm 2; Zaheer et al., NeurIPS 2018.

    m ← β₁ m + (1 − β₁) Δ
    v ← v − (1 − β₂) Δ² sign(v − Δ²)
    x ← x + η m / (√v + τ)

If the gradients suddenly become small, Adam forgets v within 1 / (1 − β₂) rounds and then takes long steps. Yogi's v
falls only by a small share of the small Δ². The start, the correction of the bias and refactorizations are those of
`adam`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from .adam import Adam


@dataclass(frozen=True)
class Yogi(Adam):
    """The Yogi optimizer, with Adam's options and memory."""

    @override
    def second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        new: np.ndarray = v - (1 - self.beta2) * square * np.sign(v - square)
        return new


OPTIMIZER = Yogi
