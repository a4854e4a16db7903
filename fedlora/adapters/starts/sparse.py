"""A with a quarter of its values drawn from a normal distribution and the rest 0. Its rows have length 1.

FlyLoRA (NeurIPS 2025, arXiv:2510.08396) freezes a sparse random A, of which k / r of each row's values are drawn; its
default, k = 8 of r = 32, is a quarter. Its tokens use k of the r rows each. Here every token uses every row, as FlyLoRA
does at k = r. Its values have a standard deviation of 1 / r, so that its rows get longer with the layer; here a
learning rate fits layers of all sizes.

This start provides no B, so it does not fit families that freeze B.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start

DENSITY = 0.25
"""Share of a row's values that are drawn, rounded up to whole values."""


class Sparse(Start):
    """The start with a sparse random A, whose rows are nearly orthogonal."""

    gives: ClassVar[tuple[str, ...]] = ("A",)
    orthonormal: ClassVar[bool] = False

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        shape = (site.rank, site.d_in)
        drawn = -int(-DENSITY * site.d_in // 1)
        places = source.uniform(f"{site.name}.places", shape).argsort(dim=1)[:, :drawn]
        values = source.draw(f"{site.name}.A", shape).gather(1, places)
        rows = torch.zeros(shape, dtype=torch.float64).scatter(1, places, values)
        return Bases(A=rows / rows.norm(dim=1, keepdim=True), B=None)


START = Sparse
