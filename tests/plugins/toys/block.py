"""Block indicators: start A with 1 where c = j modulo r, with normalised rows, and B likewise; nothing is random.

Kang and Yin (MiSS), 2024, arXiv:2409.15371, whose update is that of such an A.
"""

from __future__ import annotations

import torch

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Block(Start):
    """The block start, with the same bases on every machine."""

    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=_indicator(site.rank, site.d_in), B=_indicator(site.rank, site.d_out).T)


def _indicator(rank: int, size: int) -> torch.Tensor:
    rows = torch.zeros(rank, size, dtype=torch.float64)
    rows[torch.arange(size) % rank, torch.arange(size)] = 1
    return rows / rows.norm(dim=1, keepdim=True)


START = Block
