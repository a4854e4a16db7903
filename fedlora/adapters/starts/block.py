"""Indicators of blocks: row j of A is constant where the column is j modulo r, and 0 elsewhere. B likewise.

Kang and Yin (MiSS, formerly Bone), 2024, arXiv:2409.15371. With a trained B this is the update of MiSS, ΔW[:, c] =
D[:, c mod r], and with a trained core between A and B that of its smaller form "mini". The papers' rows consist of
ones. Here they have length 1, as with other starts, so that the learning rate does not grow with the layer: B is then
√(d_in / r) times as long as D, where r divides d_in.

Nothing is random, and the bases are the same bits on every machine.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Block(Start):
    """The start that sums up every r-th input, and spreads each result over every r-th output."""

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=_indicators(site.rank, site.d_in), B=_indicators(site.rank, site.d_out).T)


def _indicators(rank: int, size: int) -> torch.Tensor:
    rows = torch.zeros(rank, size, dtype=torch.float64)
    rows[torch.arange(size) % rank, torch.arange(size)] = 1
    lengths: torch.Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths


START = Block
