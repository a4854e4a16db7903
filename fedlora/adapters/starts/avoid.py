"""Random orthonormal bases that leave out the strongest directions of a layer's inputs on public texts: avoid:FILE.

A few directions hold a large part of every token's input. An A that reads them spends its clipped gradient on what all
texts have in common. So the rows of A are drawn as for `orthonormal`, and made orthogonal to the leading right singular
vectors of the layer's inputs at about a thousand tokens of the file. Labels are not needed.

In trials over whole runs with AdamW this start was worse than `orthonormal`, though it promised more of the first step.
It is here for study and for short runs.
"""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters.start import OrthogonalStart, Reads


class Avoid(OrthogonalStart):
    """The start that does not read what all public texts have in common."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public texts"
    directions: ClassVar[int] = 4


START = Avoid
