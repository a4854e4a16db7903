"""The leading singular vectors of the frozen weight.

Meng et al. (PiSSA), NeurIPS 2024, arXiv:2404.02948, takes the same, and their lengths too.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fedlora.adapters.family import Site
from fedlora.adapters.start import Reads, SingularStart, Source


class Weight(SingularStart):
    """Of W0."""

    reads: ClassVar[Reads] = "weights"

    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        return source.weight(site)


START = Weight
