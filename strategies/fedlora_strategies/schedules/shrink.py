"""Shrink: begin with the whole rank, and retire the ranks whose change is explained by noise.

After SoRA (Ding et al. 2023, arXiv:2311.11696), CoDyRA (Lu et al. 2024, arXiv:2412.01004) and DiffoRA
(arXiv:2502.08905), decided by the server from the mean of the noised uploads:

    after a quarter of the rounds    retire ranks with a score below 1 + 2 √(2 / d_out), the lowest first, while all
                                     layers together have more than TOTAL
    after half of the rounds         retire the lowest until they have TOTAL

A retired rank leaves ΔW, and its noise with it. Each layer keeps at least one. The kept ranks move to the front, and a
frozen A whose rows have moved is sent again.

SoRA and CoDyRA train a gate for each rank with a threshold in each step. Beside a trained B a gate adds nothing but
values to clip and to noise: the length of B's column takes its place. DiffoRA can leave a layer without an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout

from ._ranks import Decided, noise_limit


@dataclass(frozen=True)
class Shrink(Decided):
    """The schedule that retires ranks."""

    form: ClassVar[str] = "shrink:TOTAL"

    @override
    def begins_with(self, rank: int) -> int:
        return rank

    @override
    def decide(self, scores: list[np.ndarray], layout: AdapterLayout, *, last: bool) -> list[np.ndarray]:
        limits = [np.inf if last else noise_limit(site.d_out) for site in layout.sites]
        noise = sorted((float(z), m, j) for m, score in enumerate(scores) for j, z in enumerate(score) if z < limits[m])
        kept = [np.ones(len(score), bool) for score in scores]
        for _, m, j in noise:
            if sum(map(np.sum, kept)) > self.total and kept[m].sum() > 1:
                kept[m][j] = False
        return [np.flatnonzero(columns) for columns in kept]


SCHEDULE = Shrink
