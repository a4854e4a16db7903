"""The geometric median of each tensor: the point whose distances to the uploads have the smallest sum.

Pillutla et al., 2019, arXiv:1912.13445, by the iteration of Weiszfeld:

    x ← Σ a_k u_k / Σ a_k,   a_k = w_k / ‖u_k − x‖

Fewer than half of the uploads cannot move it far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.plan import Tensors
from fedlora_strategies.reductions import Collected, Reduction


@dataclass(frozen=True)
class GeometricMedian(Reduction):
    """A reduction that needs every upload by itself, and keeps all of a round in memory.

    Attributes:
        steps: how many times the point moves.
    """

    linear: ClassVar[bool] = False
    steps: int = 30

    @property
    @override
    def fewest(self) -> int:
        return 3

    @override
    def withstands(self, uploads: int) -> int:
        return (uploads - 1) // 2

    @override
    def begin(self, sent: Tensors) -> Collected:
        return Collected(self._combine)

    def _combine(self, uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return {name: self._middle(np.stack([upload[name] for upload in uploads], dtype=np.float64), np.array(weights))
                for name in uploads[0]}

    def _middle(self, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        x = np.median(points, axis=0)
        for _ in range(self.steps):
            away = np.sqrt(np.square(points - x).reshape(len(points), -1).sum(axis=1))
            x = np.average(points, axis=0, weights=weights / np.maximum(away, 1e-12))
        return x.astype(np.float32)


REDUCTION = GeometricMedian
