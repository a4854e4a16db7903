"""The leading directions in which a layer's inputs vary on public texts, as in eva:FILE.

Paischer et al. (EVA), 2024, arXiv:2410.07170. The rows of A are the leading right singular vectors of the layer's
centred inputs at about a thousand tokens of the file. Labels are not needed. B has random orthonormal columns, for
families that freeze it.

EVA also gives more rank to the layers whose inputs need it, and scales them accordingly. That is left out: the rank of
each layer is the run's (--ranks sets it by hand).
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start
from fedlora.algebra import leading_factors, orthonormal_rows


class Eva(Start):
    """The start from the variance of the inputs on public texts."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public texts"

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        assert source.inputs is not None, "this start is only made with public texts"
        inputs = source.inputs(site).double()
        if site.rank > len(inputs):
            raise ValueError(f"rank {site.rank} exceeds the {len(inputs)} tokens of the start's file that {site.name} "
                             "is given; name a longer file, or choose a smaller --rank")
        A = leading_factors(inputs - inputs.mean(dim=0), site.rank).A
        return Bases(A=A, B=orthonormal_rows(source.draw(f"{site.name}.B", (site.rank, site.d_out))).T)


START = Eva
