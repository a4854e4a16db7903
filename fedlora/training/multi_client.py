r"""Several simulated clients in lockstep: one forward and backward pass of the base model that they share.

A client that contributes a few short records to a step leaves most of a processor idle. Here the records of K clients
go through the frozen weights together, and through the trained ones each on its own: with the clients' tensors stacked,
record i of client k(i) has

    y_i = x_i W_k(i)^T + b_k(i)        gradient of x_i: g_i W_k(i)

and the gradients of W and b by record are those of `per_example`. Everything after that is each client's own, and the
code is that of one client: its sampler and its streams, its sum and its noise, its optimiser, its runtime checks.

A client ends where it would end alone, but for the rounding of sums in another order (1e-5 in fp32).

Symbol   Here     Shape
W, b     stacks   [clients, d_out, d_in], [clients, d_out]
k        owners   [records]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.tasks import Records, concatenate
from fedlora.training.accumulation import PlainStep, PrivateStep
from fedlora.training.per_example import GradientBuffer, PerExampleLinear
from fedlora.training.runtime_checks import FrozenCheck, GradientCheck, tell_finite, tells
from fedlora.training.sampling import Draw, Sampler
from fedlora.training.trainer import Trainer, TrainingJob, TrainResult, optimizer, plain_divisor, training_advice


class Routes:
    """Through which client's tensors each record of a micro-batch goes.

    Args:
        stacks: the model's parameter, by its id → what stands for it, by client: [clients, *its shape].
    """

    owners: torch.Tensor

    def __init__(self, stacks: Mapping[int, torch.Tensor]) -> None:
        self._stacks = stacks

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """[records, *shape]"""
        return self._stacks[id(parameter)][self.owners]


class RoutedLinear(PerExampleLinear):
    """A trained layer in which each record meets its own client's weights; their gradients go to the buffer."""

    routes: Routes

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _LinearRouted.apply(inputs, self.weight, self)


class _LinearRouted(torch.autograd.Function):
    """`weight`, the model's own, is there to have a gradient asked for; none is returned."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, layer: RoutedLinear) -> torch.Tensor:
        W = layer.routes.of(layer.weight)
        b = None if layer.bias is None else layer.routes.of(layer.bias)
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            precision = torch.get_autocast_dtype(kind)
            inputs, W, b = inputs.to(precision), W.to(precision), None if b is None else b.to(precision)
        x = layer.by_record(inputs)
        ctx.save_for_backward(inputs, W)
        ctx.layer = layer
        y = torch.bmm(x, W.mT) if b is None else torch.baddbmm(b[:, None], x, W.mT)
        return y.reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:  # type: ignore[override]
        inputs, W = ctx.saved_tensors
        ctx.layer.write(inputs, gradient)
        onward = torch.bmm(ctx.layer.by_record(gradient), W).view_as(inputs) if ctx.needs_input_grad[0] else None
        return onward, None, None


class _Share(GradientBuffer):
    """One client's tensors, and its rows of the buffer that all clients share."""

    def check_complete(self) -> None:
        """It was asked of the shared buffer."""


class _SummedStep(PlainStep):
    """A step without privacy, from the buffer's rows in place of autograd's sum."""

    def __init__(self, inner: torch.optim.Optimizer, divisor: float, share: _Share) -> None:
        super().__init__(inner, divisor)
        self._share = share
        self._sum = torch.zeros(share.values, device=share.slots[0].parameter.device)

    def take(self, places: np.ndarray) -> None:
        """As of `PrivateStep`."""
        rows = self._share.rows
        self._sum += torch.from_numpy(self.group.weights[places]).to(rows) @ rows

    def finish(self, *, telling: Callable[[], bool]) -> None:
        for slot in self._share.slots:
            slot.parameter.grad = (self._sum[slot.columns] / self.divisor).view_as(slot.parameter)
        super().finish(telling=telling)
        self._sum.zero_()


class _Client:
    """One client's part: all that it would have if it trained alone.

    Args:
        parameters: name → its tensors, the trained ones of its own and the frozen ones that all share.
        first: where its records begin among everybody's.
    """

    def __init__(self, trainer: Trainer, training: TrainingJob, parameters: Mapping[str, nn.Parameter],
                 first: int) -> None:
        run, records, layout = training.run, training.records, trainer.adapted.layout
        self.training, self.first, self.records = training, first, records
        self.parameters = {spec.name: parameters[spec.name] for spec in layout.trained}
        self.share = _Share([(parameters[spec.name], spec.group) for spec in layout.trained])
        self.gradients = GradientCheck(layout, parameters, self.share)
        self.sampler = Sampler(len(records), records.units, training.sampling_rate, training.rows_per_unit,
                               training.stream("sampling"))
        inner = optimizer(run.optimizer, training.lr, list(self.parameters.values()))
        self.step: PrivateStep | _SummedStep
        if training.noise_multiplier is None:
            self.step = _SummedStep(inner, plain_divisor(run, records, training.sampling_rate), self.share)
        else:
            self.step = trainer.private_step(run, inner, self.share, self.gradients, clip_norm=training.clip_norm,
                                             noise_multiplier=training.noise_multiplier,
                                             noise=training.stream("noise"))
        self.drawn: list[int] = []
        self.loss, self.rows = 0.0, 0

    def draw(self, most: int) -> list[Draw]:
        self._draw, self._losses = self.sampler.draw(), 0.0
        return list(self._draw.groups(most))

    def take(self, rows: torch.Tensor, losses: torch.Tensor, places: np.ndarray) -> None:
        """Its part of a micro-batch: gradients and losses by record, and where they stand in the open group."""
        self.share.show(rows, frozenset())
        self.step.take(places)
        self.share.disarm()
        self._losses += float(losses.sum())

    def finish(self) -> None:
        self.step.finish(telling=partial(tells, self.records, self._draw.indices, self._losses))
        self.drawn.append(len(self._draw))
        self.loss, self.rows = self.loss + self._losses, self.rows + len(self._draw.indices)

    def result(self) -> TrainResult:
        self.gradients.tell()
        self.step.close()
        tell_finite(self.rows, self.step.nonfinite)
        total = sum(self.drawn)
        return TrainResult(
            tensors={name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()},
            steps=len(self.drawn), drawn=tuple(self.drawn),
            mean_loss=self.loss / self.rows if self.rows else float("nan"),
            clipped_share=self.step.clipped / total if total else 0.0, nonfinite=self.step.nonfinite)


class MultiClientTrainer(Trainer):
    """A trainer that does the trainings it is given together in lockstep. For simulations only: the clients of one
    process share a pass, and in bf16 its rounding. Of one alone, it is a `Trainer`."""

    def run_all(self, trainings: Sequence[TrainingJob]) -> list[TrainResult]:
        """`run` for several clients of one round, together.

        Raises:
            ValueError: they differ in the plan or the frozen tensors, or have dropout, which cannot repeat.
        """
        if len(trainings) < 2:
            return super().run_all(trainings)
        one = trainings[0]
        names = {spec.name for spec in self.adapted.layout.frozen}
        if any(other.run != one.run or any(not np.array_equal(other.start[name], one.start[name]) for name in names)
               for other in trainings[1:]):
            raise ValueError("clients that train together must have one plan and the same frozen tensors")
        if one.run.dropout:
            raise ValueError(f"dropout is {one.run.dropout:g}: clients that train together (--batch-clients) cannot "
                             "each have the dropout that they would have alone; use --dropout 0")
        self.adapted.write(one.start)
        frozen = FrozenCheck(self.adapted, [parameter for _, parameter in self.adapted.trained_parameters()])
        records = concatenate([training.records for training in trainings])
        with self._routed(trainings) as (routes, clients), training_advice():
            for _ in range(one.run.local_steps):
                self._step(records, clients, routes)
            frozen.check()
            for client in clients:
                client.step.check()
            self.noise_pool.check()
            return [client.result() for client in clients]

    @contextlib.contextmanager
    def _routed(self, trainings: Sequence[TrainingJob]) -> Iterator[tuple[Routes, list[_Client]]]:
        """The clients, with the model's trained layers routing to their tensors."""
        stacks = {spec.name: torch.stack([torch.tensor(training.start[spec.name]) for training in trainings])
                  .to(self.device, torch.float32) for spec in self.adapted.layout.trained}
        own = self.adapted.parameters()
        routes = Routes({id(own[name]): stack for name, stack in stacks.items()})
        clients, first = [], 0
        for k, training in enumerate(trainings):
            # parameters that share memory with the stacks: what an optimizer writes is what the layers read
            mine = {name: nn.Parameter(stack[k]) for name, stack in stacks.items()}
            clients.append(_Client(self, training, own | mine, first))
            first += len(training.records)
        leaves = [leaf for leaf, _ in self.adapted.trained_leaves()]
        for leaf in leaves:
            leaf.__class__, leaf.routes = RoutedLinear, routes  # type: ignore[assignment]
        try:
            yield routes, clients
        finally:
            self.buffer.disarm()
            for leaf in leaves:
                leaf.__class__ = PerExampleLinear
                del leaf.routes

    def _step(self, records: Records, clients: Sequence[_Client], routes: Routes) -> None:
        """One step of every client; those with units of several records may take several turns."""
        groups = [client.draw(max(1, self.most_rows // len(clients))) for client in clients]
        for turn in range(max(map(len, groups))):
            active = [(k, groups[k][turn]) for k in range(len(clients)) if turn < len(groups[k])]
            for k, group in active:
                clients[k].step.open(group)
            owners = np.concatenate([np.full(len(group.indices), k) for k, group in active])
            places = np.concatenate([np.arange(len(group.indices)) for _, group in active])
            indices = np.concatenate([clients[k].first + group.indices for k, group in active])
            for length, part in self.micro_batches(records, indices):
                self._micro_batch(records, indices[part], length, owners[part], places[part], clients, routes)
            for k, _ in active:
                clients[k].step.shut()
        for client in clients:
            client.finish()

    def _micro_batch(self, records: Records, indices: np.ndarray, length: int, owners: np.ndarray, places: np.ndarray,
                     clients: Sequence[_Client], routes: Routes) -> None:
        """Owners ascend, so that each client's rows are neighbours."""
        routes.owners = torch.from_numpy(owners).to(self.device)
        losses = self.fill_buffer(records, indices, length)
        present, starts = np.unique(owners, return_index=True)
        for k, start, end in zip(present, starts, [*starts[1:], len(owners)], strict=True):
            clients[k].take(self.buffer.rows[start:end], losses[start:end], places[start:end])
        self.buffer.disarm()
