"""A uniform in ±1/√d_in, as PEFT's default: rows of norm ≈ 1/√3.

He et al., ICCV 2015, arXiv:1502.01852, with the gain that PEFT takes. It gives no B, for families that freeze one.
"""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Kaiming(Start):
    """Scaled noise."""

    gives: ClassVar[tuple[str, ...]] = ("A",)
    orthonormal: ClassVar[bool] = False

    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=source.uniform(f"{site.name}.A", (site.rank, site.d_in)) / site.d_in**0.5, B=None)


START = Kaiming
