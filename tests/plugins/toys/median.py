"""Coordinate-wise median: combine uploads so that fewer than half of them cannot move the result far.

Yin et al., ICML 2018, arXiv:1803.01498. The weights are ignored.
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
    """The median. It needs all uploads at once."""

    linear: ClassVar[bool] = False

    def begin(self) -> Collected:
        return Collected(_median)


def _median(uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    return {name: np.median([upload[name] for upload in uploads], axis=0).astype(np.float32) for name in uploads[0]}


REDUCTION = Median
