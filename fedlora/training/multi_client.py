r"""Several simulated clients in lockstep: one forward and backward pass of the base model that they share.

A client that contributes a few short records to a step leaves most of a processor idle. Here the records of K clients
go through the frozen weights together, and through the trained ones each on its own: the buffer routes record i to the
tensors of its client k(i), which are stacked, and the leaves know how (`fedlora.adapters.leaves`).

A client ends where it would end alone, but for the rounding of sums in another order (1e-5 in fp32), and in bf16 the
pass's. For simulations only.

Symbol   Here     Shape
W        stacks   [clients, *shape]
k        owners   [records]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.plan import Tensors
from fedlora.tasks import Records
from fedlora.training.accumulation import PlainStep
from fedlora.training.adjustments import Adjuster
from fedlora.training.gradient_buffer import GradientBuffer
from fedlora.training.job import TrainingJob
from fedlora.training.loop import Client


def check_alike(jobs: Sequence[TrainingJob], adapted: AdaptedModel) -> None:
    """Raises ValueError where clients cannot share a pass: they differ in the plan, the frozen tensors or what is
    active, or have dropout, which cannot repeat.
    """
    one, names = jobs[0], {spec.name for spec in adapted.layout.frozen}
    if any((other.run, other.active) != (one.run, one.active) or any(
            not np.array_equal(_start(other)[name], _start(one)[name]) for name in names) for other in jobs[1:]):
        raise ValueError("clients that train together must have one plan, the same active and the same frozen tensors")
    if one.run.dropout:
        raise ValueError(f"dropout is {one.run.dropout:g}: clients that train together (--batch-clients) cannot each "
                         "have the dropout that they would have alone; use --dropout 0")


def _start(job: TrainingJob) -> Tensors:
    assert job.start is not None, "clients that train together start from tensors of their own"
    return job.start


class Together:
    """Passes that several clients share.

    Args:
        stacks: the model's parameter, by its id → what stands for it, by client.
        fill: takes records through the model and leaves their gradients in `buffer`; returns [records] losses.
    """

    def __init__(self, buffer: GradientBuffer, stacks: Mapping[int, torch.Tensor], most_rows: int,
                 micro_batches: Callable[[Records, np.ndarray], Iterator[tuple[int, np.ndarray]]],
                 fill: Callable[[Records, np.ndarray, int], torch.Tensor]) -> None:
        self._buffer, self._stacks, self._fill = buffer, stacks, fill
        self.most_rows, self.micro_batches = most_rows, micro_batches

    def through(self, records: Records, indices: np.ndarray, length: int, clients: Sequence[Client],
                owners: np.ndarray, places: np.ndarray) -> None:
        """Owners ascend, so that each client's rows are neighbours."""
        buffer = self._buffer
        device = next(iter(self._stacks.values())).device
        buffer.route(self._stacks, torch.from_numpy(owners).to(device))
        losses = self._fill(records, indices, length)
        present, starts = np.unique(owners, return_index=True)
        for k, start, end in zip(present, starts, [*starts[1:], len(owners)], strict=True):
            mine = clients[k].buffer
            mine.show(buffer.rows[start:end], frozenset(id(slot.parameter) for slot in mine.slots))
            clients[k].step.take(places[start:end])
            mine.disarm()
            clients[k].losses.append(losses[start:end].sum())
        buffer.disarm()


class SummedStep(PlainStep):
    """A step without privacy, from the rows of a client's buffer in place of autograd's sum."""

    def __init__(self, inner: torch.optim.Optimizer, divisor: float, buffer: GradientBuffer,
                 adjust: Adjuster | None) -> None:
        super().__init__(inner, divisor, adjust)
        self._buffer = buffer
        self._sum = torch.zeros(buffer.values, device=buffer.slots[0].parameter.device)

    def take(self, places: np.ndarray) -> None:
        """As of `PrivateStep`."""
        rows = self._buffer.rows
        self._sum += torch.from_numpy(self.group.weights[places]).to(rows) @ rows

    def finish(self, *, telling: Callable[[], bool]) -> None:
        for slot in self._buffer.slots:
            slot.parameter.grad = (self._sum[slot.columns] / self.divisor).view_as(slot.parameter)
        super().finish(telling=telling)
        self._sum.zero_()


def stacked(jobs: Sequence[TrainingJob], adapted: AdaptedModel, device: torch.device) -> tuple[
        dict[int, torch.Tensor], list[dict[str, nn.Parameter]]]:
    """The clients' trained tensors, stacked under the ids of the model's parameters; and each client's own, by name,
    which share memory with the stacks: what an optimiser writes is what the leaves read.
    """
    own = adapted.parameters()
    stacks = {spec.name: torch.stack([torch.tensor(_start(job)[spec.name]) for job in jobs]).to(device, torch.float32)
              for spec in adapted.layout.trained}
    mine = [own | {name: nn.Parameter(stack[k]) for name, stack in stacks.items()} for k in range(len(jobs))]
    return {id(own[name]): stack for name, stack in stacks.items()}, mine
