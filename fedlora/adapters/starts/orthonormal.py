"""A with orthonormal rows and B with orthonormal columns, uniformly distributed."""

from __future__ import annotations

from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start
from fedlora.algebra import orthonormal_rows


class Orthonormal(Start):
    """The start with orthonormal bases of random Gaussian matrices."""

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=orthonormal_rows(source.draw(f"{site.name}.A", (site.rank, site.d_in))),
                     B=orthonormal_rows(source.draw(f"{site.name}.B", (site.rank, site.d_out))).T)


START = Orthonormal
