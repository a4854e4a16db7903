"""The first rows and columns of the frozen weight, made orthonormal.

NLoRA and its smaller form IntTune (2025, arXiv:2502.14482) start A at the first r rows of W0, B at its first r columns,
and the core between them at the r × r corner, so that their model does not start as the base model. Here the rows and
columns are orthonormalised, which costs two thin QR factorizations and no SVD, and the core starts at 0.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start
from fedlora.algebra import orthonormal_rows


class Nystrom(Start):
    """The start from r rows and r columns of the frozen weight W0."""

    reads: ClassVar[Reads] = "weights"

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        weight = source.weight(site).double()
        return Bases(A=orthonormal_rows(weight[:site.rank]), B=orthonormal_rows(weight[:, :site.rank].T).T)


START = Nystrom
