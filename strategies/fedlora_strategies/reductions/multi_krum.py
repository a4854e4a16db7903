"""Multi-Krum: average the uploads that lie closest to the others, and leave the rest out.

Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017, arXiv:1703.02757.

    score(i) = Σ ‖u_i − u_j‖² over the n − f − 2 uploads j ≠ i that are closest to u_i
    x        = mean of the m uploads with the lowest scores;   m = n − f unless it is given

Distances are L2 norms over all trained tensors together. They do not depend on what was sent. Uploads whose score is
the same as that of the m-th are kept too, so that the result does not depend on the clients' order.

Symbol   Here   Meaning
n               the number of uploads in the round
f        f      the number of hostile clients to withstand
m        m      the number of uploads to keep

Withstands  f of n uploads, whatever they hold. Let D be the largest distance between two uploads of honest clients.
            Then each upload that is kept is an honest one, or lies within √((n − f − 2) / (n − 2f − 1)) · D of an
            honest one, which is D for f = 1: its score is at most that of some honest client, (n − f − 2) D², and at
            least n − 2f − 1 of the uploads that make up its score are honest. A round needs n > 2f + 2 uploads.
            A hostile upload that is as close as this to the others is kept. Small deviations of many values are
            better limited by the median or the trimmed mean.
Costs       Accuracy: without attackers, f honest uploads of each round are lost, those that are the most unusual.
            Memory and time for 20 uploads of 1 million values: 80 MB for all uploads and 12 MB; 0.28 s on one core.
            The time grows with the square of the number of uploads.
Weights     None: a client counts once, however many examples it claims.
Excludes    Secure aggregation, because it must see each upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.algebra import weighted_mean
from fedlora.plan import Tensors

from . import Collected, Reduction
from ._blocks import blocks


@dataclass(frozen=True)
class MultiKrum(Reduction):
    """The mean of the uploads that lie closest to the others.

    Attributes:
        f: The number of hostile clients to withstand.
        m: The number of uploads to keep; 1 is Krum. 0 stands for all but f.

    Raises:
        ValueError: A number is below 0.
    """

    f: int = 1
    m: int = 0
    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("f", "m"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")

    @property
    @override
    def fewest(self) -> int:
        return max(2 * self.f + 3, self.m + self.f)

    @override
    def withstands(self, uploads: int) -> int:
        return self.f if uploads >= self.fewest else 0

    @override
    def begin(self, sent: Tensors) -> Collected:
        return Collected(self._closest)

    def _closest(self, uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        n = len(uploads)
        distances = squared_distances(uploads)
        np.fill_diagonal(distances, np.inf)
        scores = np.sort(distances, axis=1)[:, :n - self.f - 2].sum(axis=1)
        limit = np.sort(scores)[(self.m or n - self.f) - 1]
        chosen = [upload for upload, score in zip(uploads, scores, strict=True) if score <= limit]
        return weighted_mean(chosen, [1.0] * len(chosen))


def squared_distances(uploads: Sequence[Tensors]) -> np.ndarray:
    """Return the squared L2 distance of every two uploads, [uploads, uploads] float64.

    The differences are summed as they are, and not through scalar products, which would lose the small distances
    between long uploads, and whose bits depend on the number of threads.
    """
    distances = np.zeros((len(uploads), len(uploads)))
    for _, _, values in blocks(uploads):
        for i in range(len(uploads) - 1):
            between = values[i + 1:] - values[i]
            distances[i, i + 1:] += np.square(between, out=between).sum(axis=1)
    return distances + distances.T


REDUCTION = MultiKrum
