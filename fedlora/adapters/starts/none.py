"""Nothing at all, for families that take no factors of a start.

Such a family has none, or draws its own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Bases, Site
from fedlora.adapters.start import Source, Start


class Nothing(Start):
    """The start that provides no basis."""

    gives: ClassVar[tuple[str, ...]] = ()
    orthonormal: ClassVar[bool] = False

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        return Bases(A=torch.empty(0, site.d_in, dtype=torch.float64), B=None)


START = Nothing
