r"""Adam at the server (FedAdam): take steps of similar size for every value, whatever the scale of its gradients.

Reddi et al., ICLR 2021, arXiv:2003.00295, Algorithm 2.

    m ← β₁ m + (1 − β₁) Δ
    v ← β₂ v + (1 − β₂) Δ²
    x ← x + η m / (√v + τ)

As in the paper, v starts at τ², and the bias of the first rounds is not corrected. Where |Δ| is far above τ, the first
rounds step (1 − β₁) / √(1 − β₂) times as far as later ones: equally far with the default β's, ten times as far with
β₁ = 0. With `correct_bias=1`, v starts at 0, and m and v are divided by 1 − β₁ᵗ and 1 − β₂ᵗ after t steps (Kingma & Ba,
2015, arXiv:1412.6980), so that every round's step has the same size.

After a refactorization, first moments are rotated, and second moments by the squares of the rotation (see `turn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from ._elementwise import Elementwise, require


@dataclass(frozen=True)
class Adam(Elementwise):
    """The Adam optimizer. It remembers m, v and each tensor's number of steps.

    Attributes:
        beta1: β₁, the share of m that remains after a round, in [0, 1).
        beta2: β₂, the share of v that remains after a round, in [0, 1).
        tau: τ, added to √v, in units of the pseudo-gradient. Values with a smaller pseudo-gradient take shorter steps.
        correct_bias: 0 as in the paper, 1 to correct the bias as in Kingma & Ba.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    correct_bias: int = 0
    moments: ClassVar[Mapping[str, int]] = {"m": 1, "v": 2, "steps": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        require(0 < self.tau < float("inf"), "tau", self.tau, "positive")
        require(self.correct_bias in (0, 1), "correct_bias", self.correct_bias, "0 or 1")

    @override
    def first(self, moment: str) -> float:
        return self.tau**2 if moment == "v" and not self.correct_bias else 0.0

    @override
    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        steps = moments["steps"] + 1
        m = self.beta1 * moments["m"] + (1 - self.beta1) * gradient
        v = self.second(moments["v"], gradient**2)
        M, V = (m / (1 - self.beta1**steps), v / (1 - self.beta2**steps)) if self.correct_bias else (m, v)
        return M / (np.sqrt(V) + self.tau), {"m": m, "v": v, "steps": steps}

    def second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        """Return the next v.

        Args:
            v: The present v.
            square: Δ², the square of the pseudo-gradient.
        """
        return self.beta2 * v + (1 - self.beta2) * square


OPTIMIZER = Adam
