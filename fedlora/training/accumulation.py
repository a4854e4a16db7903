"""How the losses of micro-batches become one step, with and without privacy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.runtime_checks import GradientCheck
from fedlora.training.sampling import Draw


class Step(ABC):
    """A round's steps: for each group of a draw open, (begin, a pass, take)*, shut; then finish. After all, check.

    Attributes:
        clipped: units whose gradient was longer than the clip norm.
        nonfinite: records whose gradient was not finite, and counted as zero.
    """

    clipped = 0
    nonfinite = 0

    def open(self, group: Draw) -> None:
        """Before the micro-batches of a draw, or of a group of its units."""
        self.group = group

    def begin(self, rows: int) -> None:  # noqa: B027 (a step may have nothing to do here)
        """Before the forward pass of a micro-batch of so many rows."""

    def weights(self, places: np.ndarray, rows: int) -> torch.Tensor | None:
        """[rows] float32: of the losses in the sum whose gradient is taken; None for ones.

        Args:
            places: [records] where the first of the rows' records stand in the group; the other rows are to be dropped.
        """
        return None

    @abstractmethod
    def take(self, places: np.ndarray) -> None:
        """After the backward pass of a micro-batch, whoever did it; `places` as above."""

    def shut(self) -> None:  # noqa: B027
        """The group is complete."""

    @abstractmethod
    def finish(self, *, telling: Callable[[], bool]) -> None:
        """The draw is complete; it may have been empty.

        Args:
            telling: see `fedlora.training.runtime_checks.tells`; may be asked at the round's end.
        """

    def check(self) -> None:  # noqa: B027
        """After the last step: raises RuntimeError if any was not what it should be."""

    def close(self) -> None:  # noqa: B027
        """No more steps; drop what is unfinished."""


class PlainStep(Step):
    """Autograd's sum over the units, divided by the same constant as the private step.

    Args:
        adjust: done to the gradients before each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, divisor: float,
                 adjust: Callable[[], None] | None = None) -> None:
        self.optimizer, self.divisor, self.adjust = optimizer, divisor, adjust
        self.optimizer.zero_grad()

    def weights(self, places: np.ndarray, rows: int) -> torch.Tensor:
        weights = torch.zeros(rows)
        weights[:len(places)] = torch.from_numpy(self.group.weights[places] / self.divisor)
        return weights

    def take(self, places: np.ndarray) -> None:
        """Autograd has added it up."""

    def finish(self, *, telling: Callable[[], bool]) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # an empty draw is a step with a zero gradient, as in the private case
                    parameter.grad = torch.zeros_like(parameter)
        if self.adjust is not None:
            self.adjust()
        self.optimizer.step()
        self.optimizer.zero_grad()


class PrivateStep(Step):
    """Clip and sum each micro-batch, or each group of units; noise once for each draw.

    Args:
        gradients: is told of each draw.
    """

    def __init__(self, optimizer: PerRecordOptimizer, gradients: GradientCheck) -> None:
        self.optimizer, self.gradients = optimizer, gradients

    def open(self, group: Draw) -> None:
        super().open(group)
        self.optimizer.expect_noise()
        if group.owners is not None:
            self.optimizer.open_units(len(group))

    def begin(self, rows: int) -> None:
        self.optimizer.buffer.arm(rows)

    def take(self, places: np.ndarray) -> None:
        """Sum up the gradients that are in the buffer."""
        self.optimizer.buffer.keep(len(places))
        if self.group.owners is None:
            self._sum_up()
        else:
            self.optimizer.gather(self.group.owners[places], self.group.weights[places])

    def shut(self) -> None:
        if self.group.owners is not None:
            self._sum_up()

    def _sum_up(self) -> None:
        self.optimizer.signal_skip_step(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self, *, telling: Callable[[], bool]) -> None:
        optimizer = self.optimizer
        if self.gradients.waiting:
            self.gradients.note(optimizer.clipped_sum, optimizer.refused, telling=telling)
        optimizer.signal_skip_step(False)
        optimizer.step()
        optimizer.zero_grad()

    def check(self) -> None:
        self.optimizer.check()

    def close(self) -> None:
        self.optimizer.buffer.disarm()
        self.clipped, self.nonfinite = self.optimizer.clipped, self.optimizer.nonfinite
