"""The leading singular vectors of the frozen weight.

Meng et al. (PiSSA), NeurIPS 2024, arXiv:2404.02948, use the same vectors, scaled with the singular values.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Site
from fedlora.adapters.start import Reads, SingularStart, Source


class Weight(SingularStart):
    """The start from the frozen weight W0."""

    reads: ClassVar[Reads] = "weights"

    @override
    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        return source.weight(site)


START = Weight
