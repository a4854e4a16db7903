r"""Yogi at the server (FedYogi): Adam whose second moment changes by no more than a round's Δ² at a time.

Reddi et al., ICLR 2021, arXiv:2003.00295, Algorithm 2; Zaheer et al., NeurIPS 2018.

    m ← β₁ m + (1 − β₁) Δ
    v ← v − (1 − β₂) Δ² sign(v − Δ²)
    x ← x + η m / (√v + τ)

Where gradients become small at once, Adam forgets v in 1 / (1 − β₂) rounds and steps far; Yogi's v falls by a small
share of the small Δ². Start, correction of the bias and refactorisations are as in `adam`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .adam import Adam


@dataclass(frozen=True)
class Yogi(Adam):
    """Options and memory are Adam's."""

    def second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return v - (1 - self.beta2) * square * np.sign(v - square)


OPTIMIZER = Yogi
