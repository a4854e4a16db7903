r"""Lockstep training of several simulated clients that share each pass through the base model.

A client that contributes only a few short records to a step leaves most of a processor idle. Here the records of K
clients go through the frozen weights together. The trained weights are each client's own: they are stacked, and the
gradient buffer routes record i to the tensors of its client k(i) (`fedlora.adapters.leaves` does the arithmetic).

A client's result is the same as if it trained alone, but for rounding: sums are taken in another order (1e-5 in fp32),
and in bf16 the pass itself is rounded differently. For simulations only.

    Symbol   Here     Shape
    W        stacks   [clients, *shape]
    k        owners   [records]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters import AdaptedModel
from fedlora.plan import Tensors
from fedlora.tasks import Records
from fedlora.training.accumulation import PlainStep
from fedlora.training.adjustments import Adjuster
from fedlora.training.gradient_buffer import GradientBuffer
from fedlora.training.job import TrainingJob
from fedlora.training.loop import Client


def check_alike(jobs: Sequence[TrainingJob], adapted: AdaptedModel) -> None:
    """Check that clients can share passes.

    Args:
        jobs: The clients' training tasks.
        adapted: The model with its adapters.

    Raises:
        ValueError: The clients differ in the plan, the frozen tensors, the active tensors or the ranks; or the plan has
            dropout, whose masks would not be those of a client that trains alone.
    """
    one, names = jobs[0], {spec.name for spec in adapted.layout.frozen}
    if any((other.run, other.active, other.prefixes) != (one.run, one.active, one.prefixes) or any(
            not np.array_equal(_start(other)[name], _start(one)[name]) for name in names) for other in jobs[1:]):
        raise ValueError("clients that train together must share the plan, the active tensors, their ranks and the "
                         "frozen tensors; train these one after another")
    if one.run.dropout:
        raise ValueError(f"dropout is {one.run.dropout:g}: clients that train together (--batch-clients) cannot each "
                         "have the dropout that they would have alone; use --dropout 0")


def _start(job: TrainingJob) -> Tensors:
    assert job.start is not None, "clients that train together start from tensors of their own"
    return job.start


class Together:
    """Passes through the model that several clients share (an implementation of `fedlora.training.loop.Passes`).

    Args:
        buffer: The buffer that the model's trained layers write to.
        stacks: Id of a parameter of the model → the clients' own tensors in its place, [clients, *shape].
        most_rows: The most rows of gradients that are held in memory at once.
        micro_batches: Splits records into micro-batches, as `Passes.micro_batches` does.
        fill: Takes records through the model and leaves their gradients in `buffer`; returns [records] losses.
    """

    def __init__(self, buffer: GradientBuffer, stacks: Mapping[int, torch.Tensor], most_rows: int,
                 micro_batches: Callable[[Records, np.ndarray], Iterator[tuple[int, np.ndarray]]],
                 fill: Callable[[Records, np.ndarray, int], torch.Tensor]) -> None:
        self._buffer, self._stacks, self._fill = buffer, stacks, fill
        self.most_rows, self.micro_batches = most_rows, micro_batches

    def through(self, records: Records, indices: np.ndarray, length: int, clients: Sequence[Client],
                owners: np.ndarray, places: np.ndarray) -> None:
        """Take one micro-batch through the model, and let each client take its gradients and note its losses.

        The arguments are those of `fedlora.training.loop.Passes.through`. `owners` ascends, so that the rows of one
        client are neighbours.
        """
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
    """A step without privacy that sums the rows of the client's buffer, where `PlainStep` lets autograd sum.

    Args:
        inner: The optimizer over the client's own tensors.
        divisor: The constant that the sum of gradients is divided by.
        buffer: The client's buffer.
        adjust: The plan's adjustment of the gradients, or None.
    """

    def __init__(self, inner: torch.optim.Optimizer, divisor: float, buffer: GradientBuffer,
                 adjust: Adjuster | None) -> None:
        super().__init__(inner, divisor, adjust)
        self._buffer = buffer
        self._sum = torch.zeros(buffer.values, device=buffer.slots[0].parameter.device)

    @override
    def take(self, places: np.ndarray) -> None:
        """Add the gradients that are in the buffer to the sum, each with its weight in its unit."""
        rows = self._buffer.rows
        self._sum += torch.from_numpy(self.group.weights[places]).to(rows) @ rows

    @override
    def finish(self, *, telling: Callable[[], bool]) -> None:
        for slot in self._buffer.slots:
            slot.parameter.grad = (self._sum[slot.columns] / self.divisor).view_as(slot.parameter)
        super().finish(telling=telling)
        self._sum.zero_()


def stacked(jobs: Sequence[TrainingJob], adapted: AdaptedModel, device: torch.device) -> tuple[
        dict[int, torch.Tensor], list[dict[str, nn.Parameter]]]:
    """Copy the clients' trained tensors to the device, stacked over the clients.

    Args:
        jobs: The clients' training tasks.
        adapted: The model with its adapters.
        device: The device to train on.

    Returns:
        The stacks, as id of the model's parameter → [clients, *shape]; and for each client its own parameters by name.
        The clients' parameters share memory with the stacks, so that the trained layers read what an optimizer writes.
    """
    own = adapted.parameters()
    stacks = {spec.name: torch.stack([torch.tensor(_start(job)[spec.name]) for job in jobs]).to(device, torch.float32)
              for spec in adapted.layout.trained}
    mine = [own | {name: nn.Parameter(stack[k]) for name, stack in stacks.items()} for k in range(len(jobs))]
    return {id(own[name]): stack for name, stack in stacks.items()}, mine
