"""What the optimisers of this folder share: a rate, and moments of each value of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.plan import Tensors


@dataclass(frozen=True)
class Elementwise(ABC):
    """An optimiser that moves each value by its own history.

    Attributes:
        lr: the server's rate η.
        decay: how much of the rate is gone after the last round, linearly: 0 keeps it, 1 ends at nothing.
    """

    lr: float = 1.0
    decay: float = 0.0
    moments: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "lr", self.lr, "positive")
        require(0 <= self.decay <= 1, "decay", self.decay, "from 0 to 1")

    @abstractmethod
    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """By what a tensor moves at a rate of 1, and its next moments."""

    def first(self, moment: str) -> float:
        """What every value of a moment is before the first step."""
        return 0.0

    def begin(self, trained: Tensors) -> Tensors:
        return {f"{moment}/{name}": np.full(array.shape if power else (1,), self.first(moment), np.float64)
                for name, array in trained.items() for moment, power in self.moments.items()}

    def step(self, gradient: Tensors, own: Tensors, progress: float) -> tuple[Tensors, Tensors]:
        rate = self.lr * (1 - self.decay * progress)
        change, memory = {}, dict(own)
        for name, towards in gradient.items():
            moved, moments = self.move(towards, {moment: own[f"{moment}/{name}"] for moment in self.moments})
            change[name] = rate * moved
            memory |= {f"{moment}/{name}": array for moment, array in moments.items()}
        return change, memory

    def turn(self, own: Tensors, factors: Mapping[str, np.ndarray | None]) -> Tensors:
        """First moments W turn to W M, as the pseudo-gradients that they are averages of would have. Second moments are
        of single values and cannot: they turn to W (M ∘ M), exact where a row's values are uncorrelated, as those of
        isotropic noise are. That keeps them positive, and for an orthogonal M their sum over a row.
        """
        memory = dict(own)
        for name, factor in factors.items():
            for moment, power in self.moments.items():
                key = f"{moment}/{name}"
                if factor is None:
                    memory[key] = np.full_like(own[key], self.first(moment))
                elif power:
                    memory[key] = own[key] @ factor**power
        return memory


def require(ok: bool, name: str, value: float, bounds: str) -> None:
    """Raises ValueError where an option is out of its bounds."""
    if not ok:
        raise ValueError(f"{name} is {value:g}; it must be {bounds}")
