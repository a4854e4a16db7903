"""Columns of B and rows of A get equal lengths between rounds; the update B A stays as it is.

    B ← B D,   A ← D⁻¹ A,   D = diag(√(|A_j| / |B_j|)) over the ranks j

With both factors trained, a learning rate then means the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors
from fedlora_strategies.refactorizations import Refactored


@dataclass(frozen=True)
class Balanced:
    """Rescale every rank of every site. It has no options and no memory."""

    refreshes_frozen: ClassVar[bool] = True

    def check(self, layout: AdapterLayout) -> None:
        """Refuse adapters that are no product of two factors."""
        names = [spec.name for spec in layout.state if spec.group == "adapter"]
        if other := [name for name in names if not name.endswith((".A", ".B"))]:
            raise ValueError(f"balanced rescales the factors of B A, and these adapters have {other[0]!r} too; choose "
                             "the family lora or frozen-a")

    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        """Return an empty memory."""
        return {}

    def apply(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
              rng: np.random.Generator) -> Refactored:
        """Rescale, and tell an optimizer at the server how the coordinates of B changed."""
        after, factors = dict(state), {}
        for site in layout.modules:
            B, A = (state[f"{site}.{factor}"].astype(np.float64) for factor in "BA")
            of_B, of_A = np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1)
            if not (of_B.all() and of_A.all()):  # nothing is learned yet
                continue
            D = np.sqrt(of_A / of_B)
            after |= {f"{site}.B": (B * D).astype(np.float32), f"{site}.A": (A / D[:, None]).astype(np.float32)}
            factors |= {f"{site}.B": np.diag(D), f"{site}.A": None}
        trained = {spec.name for spec in layout.trained}
        return Refactored(after, own, {name: factor for name, factor in factors.items() if name in trained})


REFACTORIZATION = Balanced
