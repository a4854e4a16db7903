"""The first factors of the frozen weight's LU decomposition: W0 = P·L·D·U, with ones on the diagonals of L and U.

Shi et al. (LoLDU), 2024, arXiv:2410.13618. B is the first r columns of P·L and A the first r rows of U, computed in
float64. With a diagonal e between them, W0 + s·B·diag(e)·A changes D alone. LoLDU also trains one factor on the whole
update, which is left out because the product of the two would not average exactly.

A row of U whose pivot D is small beside its other values is divided by the largest of these over `LONGEST`, not by D.
That only changes the unit of its value of e, and keeps A in the range of numbers that clients accept.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start

LONGEST = 100.0
"""Largest magnitude of a value of A."""


class LU(Start):
    """The start from the LU decomposition of the frozen weight W0. Its bases are far from orthonormal."""

    reads: ClassVar[Reads] = "weights"
    orthonormal: ClassVar[bool] = False

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        if site.rank > min(site.d_out, site.d_in):
            raise ValueError(f"rank {site.rank} exceeds the smaller side of {site.name} ({site.d_out} × {site.d_in}), "
                             "whose LU decomposition has no more rows; choose a smaller --rank")
        P, L, U = torch.linalg.lu(source.weight(site).double().cpu())
        rows = U[:site.rank]
        pivots = rows.diagonal()
        least = rows.abs().amax(dim=1) / LONGEST
        divisors = torch.where(pivots.abs() < least, least, pivots)
        divisors = torch.where(divisors == 0, 1.0, divisors)  # a row of zeros stays one
        return Bases(A=rows / divisors[:, None], B=(P @ L)[:, :site.rank])


START = LU
