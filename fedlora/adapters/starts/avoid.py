"""Random orthonormal bases that leave out the strongest directions of a layer's inputs on public texts: avoid:FILE.

A few directions hold a large part of every token's input. An A that reads them spends its clipped gradient on what all
texts have in common. So the rows of A are drawn as for `orthonormal`, and made orthogonal to the leading right singular
vectors of the layer's inputs at about a thousand tokens of the file. Labels are not needed.

In trials over whole runs with AdamW this start was worse than `orthonormal`, though it promised more of the first step.
It is here for study and for short runs.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start
from fedlora.algebra import leading_factors, orthonormal_rows

DIRECTIONS = 4
"""The number of directions that are left out, if the layer has that many inputs to spare."""


class Avoid(Start):
    """The start that does not read what all public texts have in common."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public texts"

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        assert source.inputs is not None, "this start is only made with public texts"
        inputs, rows = source.inputs(site).double(), source.draw(f"{site.name}.A", (site.rank, site.d_in))
        if count := min(DIRECTIONS, len(inputs), site.d_in - site.rank):
            strongest = leading_factors(inputs, count).A
            rows = rows - rows @ strongest.T @ strongest
        return Bases(A=orthonormal_rows(rows),
                     B=orthonormal_rows(source.draw(f"{site.name}.B", (site.rank, site.d_out))).T)


START = Avoid
