"""The base class of this folder's optimizers: a learning rate, and moments that are kept for each single value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from fedlora.plan import Tensors

from . import ServerOptimizer


@dataclass(frozen=True)
class Elementwise(ServerOptimizer, ABC):
    """A server optimizer that moves each value by that value's own history.

    Attributes:
        lr: The server's learning rate η.
        decay: The share of the rate that is lost linearly until the last round is over: 0 keeps the rate, 1 ends at 0.

    Raises:
        ValueError: An option is out of its bounds.
    """

    lr: float = 1.0
    decay: float = 0.0
    moments: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "lr", self.lr, "positive")
        require(0 <= self.decay <= 1, "decay", self.decay, "from 0 to 1")

    @abstractmethod
    def move(self, gradient: np.ndarray, moments: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the change of a tensor at a rate of 1, and the tensor's next moments.

        Args:
            gradient: The tensor's pseudo-gradient, float64.
            moments: Name of a moment → its present value for this tensor.
        """

    def first(self, moment: str) -> float:
        """Return the value that a moment has everywhere before the first step."""
        return 0.0

    @override
    def begin(self, trained: Tensors) -> Tensors:
        return {f"{moment}/{name}": np.full(array.shape if power else (1,), self.first(moment), np.float64)
                for name, array in trained.items() for moment, power in self.moments.items()}

    @override
    def step(self, gradient: Tensors, own: Tensors, progress: float) -> tuple[Tensors, Tensors]:
        rate = self.lr * (1 - self.decay * progress)
        change, memory = {}, dict(own)
        for name, towards in gradient.items():
            moved, moments = self.move(towards, {moment: own[f"{moment}/{name}"] for moment in self.moments})
            change[name] = rate * moved
            memory |= {f"{moment}/{name}": array for moment, array in moments.items()}
        return change, memory

    @override
    def turn(self, own: Tensors, factors: Mapping[str, np.ndarray | None]) -> Tensors:
        """Return the memory in new coordinates, after a refactorization of trained tensors.

        First moments W become W M, as the pseudo-gradients that they average would. Second moments belong to single
        values, which cannot be rotated. They become W (M ∘ M), which is exact if the values of a row are uncorrelated,
        as those of isotropic noise are. This keeps them positive; with an orthogonal M it keeps the sum of each row.

        Args:
            own: The memory.
            factors: Tensor name → the matrix M that takes the tensor W to W M, or None if its memory must begin anew.
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
    """Check an option's value.

    Args:
        ok: Whether the value is allowed.
        name: The option's name.
        value: The value.
        bounds: The allowed values, in words that complete "it must be …".

    Raises:
        ValueError: The value is not allowed.
    """
    if not ok:
        raise ValueError(f"{name} is {value:g}; it must be {bounds}")
