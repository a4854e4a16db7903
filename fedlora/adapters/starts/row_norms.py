"""The length of each row of the frozen weight, for families that change these lengths.

Liu et al. (DoRA), ICML 2024, arXiv:2402.09353, take a weight apart into the length and the direction of each row.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start


class RowNorms(Start):
    """The start from the lengths of W0's rows. It provides neither A nor B."""

    reads: ClassVar[Reads] = "weights"
    gives: ClassVar[tuple[str, ...]] = ("V",)
    orthonormal: ClassVar[bool] = False

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        lengths = torch.linalg.vector_norm(source.weight(site).double(), dim=1)
        if empty := int((lengths == 0).sum()):
            raise ValueError(f"{empty} of the {site.d_out} rows of {site.name} are all 0 and have no direction, so "
                             "their lengths cannot be trained; choose other --targets")
        return Bases(A=torch.empty(0, site.d_in, dtype=torch.float64), B=None, V=1 / lengths)


START = RowNorms
