"""SGD at the server: multiply the clients' mean change by a learning rate; a rate of 1 gives the plain mean.

Reddi et al., arXiv:2003.00295, Algorithm 1 with SGD at the server: x ← x + η Δ. With a rate above 1, the server goes
further than the clients went on average; below 1, less far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from ._elementwise import Elementwise


@dataclass(frozen=True)
class Sgd(Elementwise):
    """The SGD optimizer. It has no memory."""

    @override
    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return gradient, {}


OPTIMIZER = Sgd
