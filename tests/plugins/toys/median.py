"""The coordinate-wise median: fewer than half of the uploads cannot move it far.

Yin et al., ICML 2018, arXiv:1803.01498. It ignores weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.plan import Tensors
from fedlora_strategies.reductions import Collected


@dataclass(frozen=True)
class Median:
    """A reduction that needs every upload by itself, and keeps all of a round in memory."""

    linear: ClassVar[bool] = False

    def begin(self) -> Collected:
        """Return an empty gathering, for one round."""
        return Collected(_median)


def _median(uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    return {name: np.median([upload[name] for upload in uploads], axis=0).astype(np.float32) for name in uploads[0]}


REDUCTION = Median
