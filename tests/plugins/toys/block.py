"""Indicators of blocks: row j of A is 1 where the column is j modulo r, normalized; B likewise. Nothing is random.

Kang and Yin (MiSS), 2024, arXiv:2409.15371, whose update is that of such an A.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Block(Start):
    """A start with the same bases on every machine."""

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=_indicator(site.rank, site.d_in), B=_indicator(site.rank, site.d_out).T)


def _indicator(rank: int, size: int) -> torch.Tensor:
    rows = torch.zeros(rank, size, dtype=torch.float64)
    rows[torch.arange(size) % rank, torch.arange(size)] = 1
    return rows / rows.norm(dim=1, keepdim=True)


START = Block
