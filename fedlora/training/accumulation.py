"""The accumulation of micro-batches into one optimizer step, with and without privacy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from typing_extensions import override

from fedlora.plan import Tensors
from fedlora.secure_sum.packages import SUM
from fedlora.training.job import Encoding
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.runtime_checks import GradientCheck
from fedlora.training.sampling import Draw


class Step(ABC):
    """The steps of one client in one round.

    The training loop calls, for each step:

        for each group of the drawn units
            open
            for each micro-batch: begin, (the pass through the model), take
            shut
        finish

    and after the last step `check`, then `close`.

    Attributes:
        group: The group that is open.
        clipped: The number of units whose gradient was longer than the clip norm; set by `close`.
        nonfinite: The number of records whose gradient was not finite and counted as zero; set by `close`.
    """

    clipped = 0
    nonfinite = 0

    def open(self, group: Draw) -> None:
        """Begin a group of drawn units."""
        self.group = group

    def begin(self, rows: int) -> None:  # noqa: B027 (a step may have nothing to do here)
        """Prepare for the forward pass of a micro-batch of this many rows."""

    def weights(self, places: np.ndarray, rows: int) -> torch.Tensor | None:
        """Return the weights of the rows' losses in the sum that is differentiated.

        Args:
            places: [records] The positions in the group of the records in the first rows. The rows after them are
                fillers, which must not count.
            rows: The number of rows, fillers included.

        Returns:
            [rows] float32, or None if each loss has weight 1.
        """
        return None

    @abstractmethod
    def take(self, places: np.ndarray) -> None:
        """Take the gradients of a micro-batch, after its backward pass.

        Args:
            places: [records] The records' positions in the group.
        """

    def shut(self) -> None:  # noqa: B027
        """Mark the group as complete: no further record can join it."""

    @abstractmethod
    def finish(self, *, telling: Callable[[], bool]) -> None:
        """Take the optimizer step with the gradients of all groups of the draw, which may have been empty.

        Args:
            telling: Returns whether the draw's gradients should reach every tensor
                (`fedlora.training.runtime_checks.tells`). It may be called as late as at the end of the round.
        """

    def check(self) -> None:  # noqa: B027
        """Check all steps of the round, after the last one.

        Raises:
            RuntimeError: A runtime check found a fault in a step.
        """

    def close(self) -> None:  # noqa: B027
        """End the round's steps, and drop what is unfinished."""

    @property
    def result(self) -> Tensors | None:
        """What the client releases in place of the trained tensors; None for those."""
        return None


class PlainStep(Step):
    """A step without privacy: the sum of the units' gradients, taken by autograd, divided by a constant.

    Args:
        optimizer: The optimizer over the trained parameters.
        divisor: The constant. It is the one that a private step would divide by, unless the client has fewer units
            than that.
        adjust: Changes the parameters' gradients before each step; None for no change.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, divisor: float,
                 adjust: Callable[[], None] | None = None) -> None:
        self.optimizer, self.divisor, self.adjust = optimizer, divisor, adjust
        self.optimizer.zero_grad()

    @override
    def weights(self, places: np.ndarray, rows: int) -> torch.Tensor:
        weights = torch.zeros(rows)
        weights[:len(places)] = torch.from_numpy(self.group.weights[places] / self.divisor)
        return weights

    @override
    def take(self, places: np.ndarray) -> None:
        """Do nothing: autograd has added the gradients up."""

    @override
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
    """A step with privacy: units are clipped and summed as they arrive, and noise is added once for each draw.

    Where each record is a unit, every micro-batch is clipped and summed at once. Where units have several records, a
    whole group is clipped when it is shut.

    Args:
        optimizer: Clips, sums, adds noise and steps.
        gradients: The runtime check that sees each draw's sum.
    """

    def __init__(self, optimizer: PerRecordOptimizer, gradients: GradientCheck) -> None:
        self.optimizer, self.gradients = optimizer, gradients

    @override
    def open(self, group: Draw) -> None:
        super().open(group)
        self.optimizer.expect_noise()
        if group.owners is not None:
            self.optimizer.open_units(len(group))

    @override
    def begin(self, rows: int) -> None:
        self.optimizer.buffer.arm(rows)

    @override
    def take(self, places: np.ndarray) -> None:
        """Add the gradients in the buffer to the sum or, if units have several records, to their units' gradients."""
        self.optimizer.buffer.keep(len(places))
        if self.group.owners is None:
            self._sum_up()
        else:
            self.optimizer.gather(self.group.owners[places], self.group.weights[places])

    @override
    def shut(self) -> None:
        if self.group.owners is not None:
            self._sum_up()

    def _sum_up(self) -> None:
        self.optimizer.signal_skip_step(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @override
    def finish(self, *, telling: Callable[[], bool]) -> None:
        if self.gradients.waiting:
            self.gradients.note(self.optimizer.clipped_sum, self.optimizer.refused, telling=telling)
        self._release()

    def _release(self) -> None:
        """Add noise to the draw's sum and step with it."""
        self.optimizer.signal_skip_step(False)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @override
    def check(self) -> None:
        self.optimizer.check()

    @override
    def close(self) -> None:
        self.optimizer.buffer.disarm()
        self.clipped, self.nonfinite = self.optimizer.clipped, self.optimizer.nonfinite


class SumStep(PrivateStep):
    """A private step that makes the integers of a secure sum, where `PrivateStep` moves the tensors.

    Args:
        optimizer: Clips and sums, and adds the noise of the grid.
        gradients: The runtime check that sees the draw's sum.
        encoding: The integers and the noise.
        order: [values] The columns of the gradient buffer in the order of the released vector.
        further: [k] What follows in the vector: what held-out records add (`fedlora.training.hold_out`).
    """

    def __init__(self, optimizer: PerRecordOptimizer, gradients: GradientCheck, encoding: Encoding,
                 order: np.ndarray, further: np.ndarray) -> None:
        super().__init__(optimizer, gradients)
        optimizer.draws_ahead = False  # the noise of the grid is drawn when it is added
        self._encoding, self._order, self._further = encoding, order, further
        self._integers: np.ndarray | None = None

    @override
    def _release(self) -> None:
        self._integers = self.optimizer.encode(self._encoding, self._order, self._further)

    @property
    @override
    def result(self) -> Tensors:
        """The integers, as `SUM`; nothing before the step is finished."""
        return {} if self._integers is None else {SUM: self._integers}
