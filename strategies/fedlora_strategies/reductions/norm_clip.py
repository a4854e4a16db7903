"""Norm clipping: shorten each update to a common length, then average.

Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963, section 4 ("norm thresholding"),
without its noise.

    Δ_k = u_k − what was sent;   x ← what was sent + Σ w_k min(1, c / ‖Δ_k‖) Δ_k / Σ w_k

‖Δ_k‖ is the L2 norm over all trained tensors together. Unless `bound` is given, c is the lower median of ‖Δ_k‖ over the
round's uploads. Then the rule has no unit and no memory: if all updates are λ times as long, so is the result.

Withstands  Fewer than half of the uploads, in one sense: the state moves by at most c, and the median c is at most the
            length of some honest client's update. The direction is another matter: h hostile uploads of n, all
            pointing elsewhere, still make up h / n of the mean. A round needs 3 uploads, or with a `bound` 1.
Costs       Accuracy: the longer half of the updates is shortened, so the state moves a little less far in each round.
            Where no update is longer than c, the result has the bits of the mean.
            Memory and time for 20 uploads of 1 million values: 80 MB for all uploads and 4 MB; 0.09 s on one core.
Weights     Those of the mean: in runs without privacy an update counts for as many examples as its client claims. The
            claims of hostile clients count too, up to ten times the lower median of the round (screening). c does not
            depend on them.
Excludes    Secure aggregation, because the server must see the length of each update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.plan import Tensors

from ..screening import lower_median
from ..under_way import distance
from . import Collected, Reduction


@dataclass(frozen=True)
class NormClip(Reduction):
    """The weighted mean of updates of limited length.

    Attributes:
        bound: c, the largest L2 norm of an update. 0 stands for the lower median of the round's norms.

    Raises:
        ValueError: The bound is below 0 or not finite.
    """

    bound: float = 0.0
    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.bound < math.inf:
            raise ValueError(f"bound is {self.bound:g}; it must be positive, or 0 for the median of the round's norms")

    @property
    @override
    def fewest(self) -> int:
        return 1 if self.bound else 3

    @override
    def withstands(self, uploads: int) -> int:
        return (uploads - 1) // 2

    @override
    def begin(self, sent: Tensors) -> Collected:
        return Collected(lambda uploads, weights: self._clipped(uploads, weights, sent))

    def _clipped(self, uploads: Sequence[Tensors], weights: Sequence[float], sent: Tensors) -> Tensors:
        norms = [distance(upload, sent) for upload in uploads]
        bound = self.bound or lower_median(norms)
        assert bound is not None, "a round without uploads is not combined"
        kept = [weight * (bound / norm if norm > bound else 1.0) for weight, norm in zip(weights, norms, strict=True)]
        total, left = math.fsum(weights), math.fsum(weight - part for weight, part in zip(weights, kept, strict=True))
        clipped = {}
        for name, array in uploads[0].items():
            # Σ w (sent + s Δ) = Σ w s u + Σ w (1 − s) sent: with nothing clipped, exactly the sum of the mean
            summed = np.zeros(array.shape, np.float64)
            for upload, weight in zip(uploads, kept, strict=True):
                summed += np.multiply(upload[name], weight, dtype=np.float64)
            summed += np.multiply(sent.get(name, 0.0), left, dtype=np.float64)
            clipped[name] = (summed / total).astype(np.float32)
        return clipped


REDUCTION = NormClip
