"""Linear layers that multiply a few rows as they multiply many.

CPUs multiply the one to three rows beyond a multiple of four in another way where there are few (with 1 and 2 threads
none of 12 and more), so that one record that comes or goes would change the others' rounding, and a server can choose
tensors that make much of it. Hence few rows have a multiple of four: what has a sequence axis by its padded lengths,
which are multiples of four (`fedlora.training.sampling.LENGTHS`), and where the plan's maximum length is none by
repeated records; what has one row for each record, as a task's head, by rows of zeros here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

ROWS, FEW = 4, 8
"""Of less than `FEW` rows for each thread there is a multiple of `ROWS`."""


def rows_of(records: int, length: int) -> int:
    """How many rows a micro-batch of so many records, padded to this length, is to have."""
    return _multiple(records) if length % ROWS else records


def multiplied(values: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`multiply(values)`; few [records, d] on a CPU have rows of zeros at the end meanwhile."""
    if values.dim() != 2 or values.device.type != "cpu" or (more := _multiple(len(values)) - len(values)) == 0:
        return multiply(values)
    return multiply(F.pad(values, (0, 0, 0, more)))[:len(values)].clone()


class FilledLinear(nn.Linear):
    """A frozen linear layer. Made by `fill_rows`, which swaps the class of a plain one."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return multiplied(inputs, super().forward)


def fill_rows(model: nn.Module) -> None:
    """Have the model's plain linear layers multiply few rows as many; parameters stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FilledLinear


def _multiple(rows: int) -> int:
    return rows if rows >= FEW * torch.get_num_threads() else -(-rows // ROWS) * ROWS
