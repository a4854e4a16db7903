"""The singular vectors of the clients' noised gradients, at the privacy cost of one round.

Each client releases two sketches of its gradient, clipped, noised, and charged like a round of training
(`fedlora.adapters.sketches`). A becomes the right singular vectors of the mean Z. If the family freezes B too, B
becomes the left singular vectors of the mean Y.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start
from fedlora.algebra import row_signs


class NoisedGradients(Start):
    """The start from the sketches of the gradient that clients released."""

    reads: ClassVar[Reads] = "clients"

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        assert source.sketches is not None, "round 0 comes before this start"
        Z, Y = source.sketches(site)
        return Bases(A=leading_rows(Z), B=leading_rows(Y.T).T)


def leading_rows(sketch: torch.Tensor) -> torch.Tensor:
    """Return the right singular vectors of an (r, n) sketch as rows, the leading one first, with fixed signs."""
    rows: torch.Tensor = torch.linalg.svd(sketch.double(), full_matrices=False)[2]
    return rows * row_signs(rows)[:, None]


START = NoisedGradients
