"""The slowest waves of a cosine transform as the rows of A and the columns of B. Nothing is random."""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Cosines(Start):
    """A start with the same bases at every seed."""

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=_waves(site.rank, site.d_in), B=_waves(site.rank, site.d_out).T)


def _waves(rank: int, size: int) -> torch.Tensor:
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    rows = torch.cos(torch.arange(rank, dtype=torch.float64)[:, None] * places)
    return rows / rows.norm(dim=1, keepdim=True)


START = Cosines
