"""Coordinate-wise median: each value becomes the median of the uploads' values.

Yin et al., ICML 2018, arXiv:1803.01498, Algorithm 1, option I.

    x_j ← median of u_1j, …, u_nj;   for an even n the mean of the two middle values

The median of the updates, added to what was sent, is the median of the uploads: it does not depend on what was sent.

Withstands  Fewer than half of the uploads, whatever they hold: each value lies between the smallest and the largest
            one of the other clients. A round needs 3 uploads; of fewer, none can be outvoted.
Costs       Accuracy: where clients differ by noise alone, the median is as noisy as a mean over two thirds of them
            (2/π for many clients). What fewer than half of the clients have learned, as their data differ from those
            of the others, is lost.
            Memory and time for 20 uploads of 1 million values: 80 MB for all uploads and 7 MB; 0.16 s on one core.
Weights     None: a client counts once, however many examples it claims.
Excludes    Secure aggregation, because it must see each upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.plan import Tensors

from . import Collected, Reduction
from ._blocks import by_value


@dataclass(frozen=True)
class Median(Reduction):
    """The coordinate-wise median. It has no options."""

    linear: ClassVar[bool] = False

    @property
    @override
    def fewest(self) -> int:
        return 3

    @override
    def withstands(self, uploads: int) -> int:
        return (uploads - 1) // 2

    @override
    def begin(self, sent: Tensors) -> Collected:
        return Collected(_median)


def _median(uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    def medians(values: np.ndarray) -> np.ndarray:
        ordered = np.sort(values, axis=0)
        middle: np.ndarray = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
        return middle

    return by_value(uploads, medians)


REDUCTION = Median
