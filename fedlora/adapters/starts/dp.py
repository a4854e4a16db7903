"""The singular vectors of the clients' noised gradients, at the price of a round.

Each client releases two sketches of its gradient, clipped, noised, and charged like a round of training
(`fedlora.adapters.sketches`). A is the right singular vectors of the mean Z, and B, where it is frozen too, the left
ones of the mean Y.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start
from fedlora.algebra import row_signs


class NoisedGradients(Start):
    """Of the released sketches."""

    reads: ClassVar[Reads] = "clients"

    def bases(self, site: Site, source: Source) -> Bases:
        assert source.sketches is not None, "whoever asks for this start has held round 0"
        Z, Y = source.sketches(site)
        return Bases(A=leading_rows(Z), B=leading_rows(Y.T).T)


def leading_rows(sketch: torch.Tensor) -> torch.Tensor:
    """The right singular vectors of (r, n), the leading one first, signs fixed."""
    rows = torch.linalg.svd(sketch.double(), full_matrices=False)[2]
    return rows * row_signs(rows)[:, None]


START = NoisedGradients
