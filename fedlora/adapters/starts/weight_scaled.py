"""The leading singular vectors of the frozen weight, each times the square root of its singular value.

Meng et al. (PiSSA), NeurIPS 2024, arXiv:2404.02948, start A and B so and take their product off the weight. With A
frozen at these values, PiSSA's update s·(B − B0)·A is that of a B that starts at 0, which is what is trained here. The
weight itself stays as it is.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Reads, Source, Start
from fedlora.algebra import leading_factors


class ScaledWeight(Start):
    """The start from the frozen weight W0 in which strong directions are long."""

    reads: ClassVar[Reads] = "weights"
    orthonormal: ClassVar[bool] = False

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        weight = source.weight(site).double()
        leading = leading_factors(weight, site.rank)
        singular = torch.einsum("mr,mn,rn->r", leading.B, weight, leading.A).clamp(min=0).sqrt()
        return Bases(A=leading.A * singular[:, None], B=leading.B * singular)


START = ScaledWeight
