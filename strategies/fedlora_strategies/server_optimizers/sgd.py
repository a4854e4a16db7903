"""A rate at the server: x ← x + η Δ; with η = 1 the plain mean.

Reddi et al., arXiv:2003.00295, Algorithm 1 with SGD at the server. Above 1 it goes further than the clients went
together, below 1 less far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ._elementwise import Elementwise


@dataclass(frozen=True)
class Sgd(Elementwise):
    """No memory."""

    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return gradient, {}


OPTIMIZER = Sgd
