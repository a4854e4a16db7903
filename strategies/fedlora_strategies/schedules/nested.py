"""Nested: in each round, train the first b ranks of all layers alone, with b drawn at random from 1 to --rank.

After DyLoRA (Valipour et al. 2023, arXiv:2210.07558), with one draw for a round in place of one for each step:

    b ~ U{1 … r}     drawn by the server from the run's seed, the same for all clients
    clients          compute with rows 1 … b of A and columns 1 … b of B alone, and train these

So each prefix of the finished adapter is an adapter of its own (`fedlora-adapter resize --by prefix`). DyLoRA
multiplies the update of a prefix by √(r / b). Here the factor is alpha / r for every b, so that a column means the same
in each round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors

from ._ranks import check_narrows
from .constant import Constant


@dataclass(frozen=True)
class Nested(Constant):
    """The schedule that draws the number of ranks of each round. It has no memory."""

    form: ClassVar[str] = "nested"

    @override
    def check(self, layout: AdapterLayout) -> None:
        check_narrows(self, layout)

    @override
    def prefixes(self, round: int, layout: AdapterLayout, own: Tensors, rng: np.random.Generator) -> Mapping[str, int]:
        if not layout.family.narrows:
            return {}
        drawn = int(rng.integers(1, layout.rank, endpoint=True)) if layout.sites else 0
        return {site.name: drawn for site in layout.sites if drawn < site.rank}


SCHEDULE = Nested
