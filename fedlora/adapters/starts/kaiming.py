"""A uniform in ±1/√d_in, PEFT's default: rows have norm ≈ 1/√3.

He et al., ICCV 2015, arXiv:1502.01852, with the gain that PEFT uses. This start provides no B, so it does not fit
families that freeze B.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Kaiming(Start):
    """The start with a scaled uniform A."""

    gives: ClassVar[tuple[str, ...]] = ("A",)
    orthonormal: ClassVar[bool] = False

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=source.uniform(f"{site.name}.A", (site.rank, site.d_in)) / site.d_in**0.5, B=None)


START = Kaiming
