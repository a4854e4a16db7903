"""The training loop: the plan's local steps of one client, or of several in lockstep.

Each client draws its step, the drawn records go through the model in micro-batches, and the gradients become its step:

    for each local step
        every client draws its units
        for each group of units, for each micro-batch of the groups' records
            one pass through the model
            every client takes the gradients of its own records
        every client finishes its step: noise, if it is private, and the optimiser

Everything but the pass is each client's own, alone or not: its sampler and its streams, its sum and its noise, its
optimiser, its runtime checks.
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
    """One client's part of the loop.

    Args:
        parameters: name → what holds the tensor, for all of the layout's state.
        buffer: the gradients of its own records, while it takes them.
        make_step: from the job, these parameters, the buffer and the check.
        first: where its records begin among everybody's.
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
        """The next step's groups of units, of at most so many each."""
        self._draw, self.losses = self._sampler.draw(), []
        return list(self._draw.groups(most))

    def finish(self) -> None:
        """The drawn records went through the model: take the step."""
        loss = torch.stack(self.losses).sum() if self.losses else torch.zeros(())
        self.step.finish(telling=partial(tells, self.job.records, self._draw.indices, loss))
        self._drawn.append(len(self._draw))
        self._loss.append(loss)
        self._rows += len(self._draw.indices)

    def result(self, tensors: Mapping[str, np.ndarray]) -> TrainResult:
        """After the loop, once the step is closed. `tensors`: as they were trained."""
        tell_finite(self._rows, self.step.nonfinite)
        self.gradients.tell()
        total = sum(self._drawn)
        return TrainResult(
            tensors=tensors, steps=len(self._drawn), drawn=tuple(self._drawn),
            mean_loss=sum(map(float, self._loss)) / self._rows if self._rows else float("nan"),
            clipped_share=self.step.clipped / total if total else 0.0, nonfinite=self.step.nonfinite)


class Passes(Protocol):
    """How micro-batches go through the model: those of one client, or of several together."""

    most_rows: int
    """How many gradients are held at once."""

    def micro_batches(self, records: Records, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(padded length, places in `indices`) of each micro-batch of these records."""

    def through(self, records: Records, indices: np.ndarray, length: int, clients: Sequence[Client],
                owners: np.ndarray, places: np.ndarray) -> None:
        """Take the records through the model, and have each client take its gradients and note its losses.

        Args:
            indices: [n] of the records.
            owners: [n] ascending: whose each is, as an index into `clients`.
            places: [n] where each stands in its client's group.
        """


def run_steps(passes: Passes, clients: Sequence[Client], stop: Callable[[], bool]) -> None:
    """Do the local steps of the clients' one plan; a step during which `stop` is true is not finished."""
    alone = len(clients) == 1
    records = clients[0].job.records if alone else concatenate([client.job.records for client in clients])
    for _ in range(clients[0].job.run.local_steps):
        if stop():
            return
        groups = [client.draw(max(1, passes.most_rows // len(clients))) for client in clients]
        if not take_groups(passes, clients, records, groups, stop):
            return
        for client in clients:
            client.finish()


def take_groups(passes: Passes, clients: Sequence[Client], records: Records, groups: Sequence[Sequence[Draw]],
                stop: Callable[[], bool] = lambda: False) -> bool:
    """Take each client's groups through the model, turn by turn; False if it was stopped."""
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
