"""Exchange of rows of A for new random ones; what they have learned stays in the stack.

Zhou, Wang and Xu, SwitchLoRA, 2024, arXiv:2406.06564, exchange single rows and columns during training, and add what
they have learned to the base weight. Here rows are exchanged between rounds, and the base weight never changes:

    J        ← the next `rows` rows of A, in turn; all of them with rows = 0
    D C      ← D C + B_J A_J          in the stack
    B_J ← 0,   A_J ← random rows of the same lengths, orthogonal to the other rows and to each other

So B A + D C stays as it is. If the stack has too few slots, it keeps the best approximation, and the server warns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors

from ..stack import check_stack, exchange, tell
from . import Refactored, Refactorization


@dataclass(frozen=True)
class Exchange(Refactorization):
    """The exchange after every `interval`-th round.

    Attributes:
        interval: The number of rounds from one exchange to the next.
        rows: The number of rows to exchange in each layer, at most its rank; 0 for all.

    Raises:
        ValueError: `interval` is below 1, or `rows` is negative.
    """

    interval: int = 5
    rows: int = 0
    refreshes_frozen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.interval < 1 or self.rows < 0:
            raise ValueError(f"interval is {self.interval} and rows is {self.rows}; interval must be at least 1, and "
                             "rows at least 0")

    def slots(self, rank: int, rounds: int) -> int:
        """Return how many slots a layer's stack needs, as for `fedlora_strategies.stack.Stacking`."""
        return self._rows(rank) * (rounds // self.interval)

    def _rows(self, rank: int) -> int:
        return min(self.rows or rank, rank)

    @override
    def check(self, layout: AdapterLayout) -> None:
        check_stack(layout, "exchange")

    @override
    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        return {}

    @override
    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
              rng: np.random.Generator) -> Refactored:
        if round % self.interval:
            return Refactored(state, own)
        after: dict[str, np.ndarray] = dict(state)
        factors: dict[str, np.ndarray | None] = {}
        stacks = []
        for site in layout.sites:
            count = self._rows(site.rank)
            chosen = (np.arange(count) + (round // self.interval - 1) * count) % site.rank
            lengths = np.linalg.norm(after[f"{site.name}.A"][chosen].astype(np.float64), axis=1)
            if (folded := exchange(after, site.name, chosen, lengths, rng)) is None:
                continue
            stacks.append(folded)
            stays = ~np.isin(np.arange(site.rank), chosen)
            factors |= {f"{site.name}.B": np.diag(stays.astype(np.float64)), f"{site.name}.A": None}
        tell(stacks)
        trained = {spec.name for spec in layout.trained}
        return Refactored(after, own, {name: factor for name, factor in factors.items() if name in trained})


REFACTORIZATION = Exchange
