"""The training loop: the local steps of one client, or of several simulated clients in lockstep.

In each step a client draws records, the records go through the model in micro-batches, and the step is taken with
their gradients:

    for each local step
        every client draws its units
        for each group of units, for each micro-batch of the groups' records
            one pass through the model
            every client takes the gradients of its own records
        every client finishes its step: noise, if it is private, and the optimizer

Clients share only the pass through the model. Each has its own sampler, random streams, gradient sum, noise, optimizer
and runtime checks, whether it trains alone or beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdapterLayout
from fedlora.tasks import Records, concatenate
from fedlora.training.accumulation import Step
from fedlora.training.gradient_buffer import GradientBuffer
from fedlora.training.job import TrainingJob, TrainResult
from fedlora.training.runtime_checks import GradientCheck, tell_finite, tells
from fedlora.training.sampling import Draw, Sampler


class Client:
    """One client's state during the loop: what it draws, and the losses and steps so far.

    Args:
        job: The client's training task.
        layout: The adapter's tensors.
        parameters: Tensor name → the parameter that holds it, for the whole of `layout.state`.
        buffer: The buffer that holds the gradients of this client's records while `step.take` reads them.
        make_step: Makes the client's `Step` from the job, the parameters, the buffer and the gradient check.
        first: The index of the client's first record in the concatenation of all clients' records.
    """

    def __init__(self, job: TrainingJob, layout: AdapterLayout, parameters: Mapping[str, nn.Parameter],
                 buffer: GradientBuffer, make_step: Callable[[TrainingJob, Mapping[str, nn.Parameter], GradientBuffer,
                                                              GradientCheck], Step], first: int = 0) -> None:
        self.job, self.buffer, self.first = job, buffer, first
        self.trained = {spec.name: parameters[spec.name] for spec in layout.trained}
        self.gradients = GradientCheck(layout, parameters, buffer)
        self.sampling = job.stream("sampling")
        self._sampler = Sampler(len(job.records), job.records.units, job.sampling_rate, job.rows_per_unit,
                                self.sampling)
        self.step = make_step(job, parameters, buffer, self.gradients)
        self.losses: list[torch.Tensor] = []
        self._drawn: list[int] = []
        self._loss: list[torch.Tensor] = []
        self._rows = 0

    def draw(self, most: int) -> list[Draw]:
        """Draw the next step, and return its units in groups of at most `most` units."""
        self._draw, self.losses = self._sampler.draw(), []
        return list(self._draw.groups(most))

    def finish(self) -> None:
        """Take the step, after all drawn records have gone through the model."""
        loss = torch.stack(self.losses).sum() if self.losses else torch.zeros(())
        self.step.finish(telling=partial(tells, self.job.records, self._draw.indices, loss))
        self._drawn.append(len(self._draw))
        self._loss.append(loss)
        self._rows += len(self._draw.indices)

    def result(self, tensors: Mapping[str, np.ndarray]) -> TrainResult:
        """Return the client's result, after the loop and after `step.close`.

        Args:
            tensors: The trained tensors, by name.
        """
        tell_finite(self._rows, self.step.nonfinite)
        self.gradients.tell()
        total = sum(self._drawn)
        return TrainResult(
            tensors=tensors, steps=len(self._drawn), drawn=tuple(self._drawn),
            mean_loss=sum(map(float, self._loss)) / self._rows if self._rows else float("nan"),
            clipped_share=self.step.clipped / total if total else 0.0, nonfinite=self.step.nonfinite)


class Passes(Protocol):
    """The way in which micro-batches go through the model: for one client, or for several together."""

    most_rows: int
    """The most rows (records' or units' gradients) that are held in memory at once."""

    def micro_batches(self, records: Records, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Split records into micro-batches.

        Args:
            records: All records.
            indices: [n] The records to split.

        Yields:
            (padded length, positions in `indices`) of each micro-batch.
        """

    def through(self, records: Records, indices: np.ndarray, length: int, clients: Sequence[Client],
                owners: np.ndarray, places: np.ndarray) -> None:
        """Take one micro-batch through the model, and let each client take its gradients and note its losses.

        Args:
            records: All clients' records.
            indices: [n] The micro-batch's records.
            length: The length in tokens that they are padded to.
            clients: All clients of the loop.
            owners: [n] For each record, its client's index in `clients`; ascending.
            places: [n] For each record, its position in its client's group.
        """


def run_steps(passes: Passes, clients: Sequence[Client], stop: Callable[[], bool],
              stepped: Callable[[int], object] = lambda steps: None) -> None:
    """Do all local steps of the plan that the clients share.

    Args:
        passes: Takes micro-batches through the model.
        clients: The clients; they have one plan.
        stop: Asked before every step and micro-batch. True ends the loop; the unfinished step is discarded.
        stepped: Told after every step how many are done. It must return at once.
    """
    alone = len(clients) == 1
    records = clients[0].job.records if alone else concatenate([client.job.records for client in clients])
    for step in range(1, clients[0].job.run.local_steps + 1):
        if stop():
            return
        groups = [client.draw(max(1, passes.most_rows // len(clients))) for client in clients]
        if not take_groups(passes, clients, records, groups, stop):
            return
        for client in clients:
            client.finish()
        stepped(step)


def take_groups(passes: Passes, clients: Sequence[Client], records: Records, groups: Sequence[Sequence[Draw]],
                stop: Callable[[], bool] = lambda: False) -> bool:
    """Take every client's groups through the model: all first groups, then all second ones, and so on.

    Args:
        passes: Takes micro-batches through the model.
        clients: The clients.
        records: All clients' records, one client after the other.
        groups: The groups of each client, in the order of `clients`.
        stop: Asked before every micro-batch.

    Returns:
        False if `stop` ended it, else True.
    """
    for turn in range(max(map(len, groups))):
        active = [(k, groups[k][turn]) for k in range(len(clients)) if turn < len(groups[k])]
        for k, group in active:
            clients[k].step.open(group)
        owners = np.concatenate([np.full(len(group.indices), k) for k, group in active])
        places = np.concatenate([np.arange(len(group.indices)) for _, group in active])
        indices = np.concatenate([clients[k].first + group.indices for k, group in active])
        for length, part in passes.micro_batches(records, indices):
            if stop():
                return False
            passes.through(records, indices[part], length, clients, owners[part], places[part])
        for k, _ in active:
            clients[k].step.shut()
    return True
