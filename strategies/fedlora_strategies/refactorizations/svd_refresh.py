"""Thin SVD of B A, whose weakest directions make room for new random ones: the rows of A can leave their row space.

    U, Σ, Vᵀ ← thin SVD of B A;   B ← U Σ,   A ← Vᵀ
    J        ← the `refresh` smallest singular values
    D C      ← D C + B_J A_J          in the stack
    B_J ← 0,   A_J ← random rows of length 1, orthogonal to the other rows and to each other

The SVD alone never takes A out of the row space that it began with, because the rows of B A lie in that of A. What the
directions J have learned goes on counting in the stack, so B A + D C stays as it is. If the stack has too few slots, it
keeps the best approximation, and the server warns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors

from ..stack import check_stack, exchange, tell
from . import Refactored
from .svd import Svd


@dataclass(frozen=True)
class SvdRefresh(Svd):
    """The thin SVD of `svd`, followed by an exchange of the weakest directions.

    Attributes:
        refresh: The number of directions to exchange in each layer, at most its rank.

    Raises:
        ValueError: `refresh` is below 1.
    """

    refresh: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; it must be at least 1. Without it, choose fedsvd")

    @override
    def check(self, layout: AdapterLayout) -> None:
        check_stack(layout, "svd-refresh")

    def slots(self, rank: int, rounds: int) -> int:
        """Return how many slots a layer's stack needs, as for `fedlora_strategies.stack.Stacking`."""
        return min(self.refresh, rank) * max((rounds - self.warmup) // self.period, 0)

    @override
    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
              rng: np.random.Generator) -> Refactored:
        turned = super().apply(state, layout, own, round, rng)
        if not self._due(round):
            return turned
        after, factors, stacks = dict(turned.state), dict(turned.factors), []
        for site in layout.sites:
            first = site.rank - min(self.refresh, site.rank)
            weakest = np.arange(first, site.rank)
            if (folded := exchange(after, site.name, weakest, np.ones(len(weakest)), rng)) is None:
                continue
            stacks.append(folded)
            factor = factors.get(f"{site.name}.B")
            factor = np.eye(site.rank) if factor is None else factor.copy()
            factor[:, first:] = 0.0  # a new direction has no memory
            factors |= {f"{site.name}.B": factor, f"{site.name}.A": None}
        tell(stacks)
        trained = {spec.name for spec in layout.trained}
        return Refactored(after, own, {name: factor for name, factor in factors.items() if name in trained})


REFACTORIZATION = SvdRefresh
