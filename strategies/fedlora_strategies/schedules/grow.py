"""Grow: begin with rank 1 in each layer, and give more ranks to the layers that change most.

After IncreLoRA (Zhang et al. 2023, arXiv:2308.12043), decided by the server from the mean of the noised uploads:

    at the start    rank 1 in each layer
    twice           the better half of the layers, by their mean score, get ranks in turn: after a quarter of the
                    rounds until half of the new ranks are given, after half of the rounds until all layers together
                    have TOTAL

A layer has at most --rank ranks. If the better half is full, the other layers get the rest. All rows of A are drawn
when the run begins; a frozen A is sent once, a trained one by its active rows. A new rank's column of B is 0, so that
growing changes no ΔW.

IncreLoRA's score is the product's gradient times its value, smoothed over steps, and it trains the next rank ahead of
its use. Neither is here: both need more than the uploads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout

from ._ranks import Decided


@dataclass(frozen=True)
class Grow(Decided):
    """The schedule that adds ranks."""

    form: ClassVar[str] = "grow:TOTAL"

    @override
    def begins_with(self, rank: int) -> int:
        return 1

    @override
    def decide(self, scores: list[np.ndarray], layout: AdapterLayout, *, last: bool) -> list[np.ndarray]:
        ranks, most = np.array(list(map(len, scores))), np.array([site.rank for site in layout.sites])
        total = self.total if last else (len(ranks) + self.total) // 2
        order = np.argsort([-float(np.mean(score)) for score in scores], kind="stable")
        half = (len(order) + 1) // 2
        for sites in (order[:half], order[half:]):
            while ranks.sum() < total and (ranks[sites] < most[sites]).any():
                for site in sites:
                    ranks[site] += ranks[site] < most[site] and ranks.sum() < total
        return [np.arange(rank) for rank in ranks]


SCHEDULE = Grow
