"""Local training of one round, with or without privacy: the same sampler, the same batches, the same loss.

Privately, each record's gradient is clipped and the sum is noised (`fedlora.training.optimizer`); the guarantee is for
one record of this client under zero-out, and holds for the tensors alone. Everything else in `TrainResult` is private.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.plan import RunPlan, Tensors
from fedlora.privacy.streams import Stream
from fedlora.tasks import Records, Task
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.per_example import GradientBuffer, per_example
from fedlora.training.precision import (
    ROUNDING,
    attend_in_float32,
    resolve_device,
    resolve_precision,
    store_frozen_weights,
)
from fedlora.training.sampling import micro_batches, poisson

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Most padded tokens of a micro-batch where --micro-batch is not given. A constant, so that runs repeat bit for bit."""

BUFFER_BYTES = 256 * 2**20
"""Most memory for per-record gradients where --micro-batch is not given."""


@dataclass(frozen=True)
class TrainResult:
    """What a round gave. Under privacy only `tensors` and `steps` may leave the machine.

    Attributes:
        tensors: the trained tensors.
        steps: optimiser steps done; fewer than planned if training was stopped.
        drawn: number of records of each step.
        mean_loss: over the drawn records; nan if there were none.
        clipped_share: share of drawn records whose gradient was longer than the clip norm; 0.0 without privacy.
        nonfinite: drawn records whose gradient was not finite, and counted as zero.
    """

    tensors: Tensors
    steps: int
    drawn: tuple[int, ...]
    mean_loss: float
    clipped_share: float
    nonfinite: int


class Trainer:
    """One per process: holds the model and its buffers over rounds and over simulated clients.

    Args:
        adapted: the model with its adapters; moved to the device, and with bf16 its frozen weights are stored so.
        task: gives micro-batches and per-record losses.
        device, precision: as on the command line; "auto" is resolved.
        micro_batch: most records computed at once; None for a bound on tokens.
        threads: of the CPU; None leaves PyTorch's default.
    """

    def __init__(self, adapted: AdaptedModel, task: Task, *, device: str = "auto", precision: str = "auto",
                 micro_batch: int | None = None, threads: int | None = None) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"--micro-batch is {micro_batch}; it must be at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        self.adapted, self.task, self.micro_batch = adapted, task, micro_batch
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        model: nn.Module = adapted.model
        model.to(self.device).eval()
        self._parameters = [(parameter, spec.group) for spec, parameter in adapted.trained_parameters()]
        self.buffer = GradientBuffer(self._parameters)
        per_example([leaf for leaf, _ in adapted.trained_leaves()], self.buffer)
        if self.precision == "bf16":
            # what travels stays in float32
            keep = {id(adapted.parameter(spec.name)) for spec in adapted.layout.state}
            store_frozen_weights(adapted.model, torch.bfloat16, keep=keep)
            if self.device.type == "cpu":
                attend_in_float32(adapted.model)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """For `Task.evaluate` on this trainer's model."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def train(self, run: RunPlan, records: Records, *, sampling_rate: float, noise_multiplier: float | None,
              clip_norm: float, sampling: Stream, noise: Stream | None, lr: float | None = None,
              stop: Callable[[], bool] = lambda: False) -> TrainResult:
        """Do the plan's local steps from the tensors that the model now holds, with a fresh optimiser.

        Args:
            sampling_rate: q of Poisson sampling; the step is divided by the plan's expected batch.
            noise_multiplier: None trains without privacy: no clipping, no noise.
            clip_norm: the client's, at most the plan's.
            sampling, noise: random streams of this round; noise is None without privacy.
            lr: the round's learning rate; None for the plan's.
            stop: asked between micro-batches; True discards the unfinished step and returns.
        Raises:
            MemoryError: naming the flags that help.
            RuntimeError: no gradient reaches the trained tensors.
        """
        if (noise_multiplier is None) != (noise is None):
            raise ValueError("a noise multiplier and a noise stream belong together; give both or neither")
        if not 0 < sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {sampling_rate!r}; it must be in (0, 1]")
        inner = _optimizer(run.optimizer, lr or run.lr, [parameter for parameter, _ in self._parameters])
        if noise_multiplier is None or noise is None:
            # a client with fewer records than the expected batch uses all of them, and their mean
            step: _Step = _PlainStep(inner, run.expected_batch if sampling_rate < 1 else len(records))
        else:
            step = _PrivateStep(PerRecordOptimizer(
                inner, self.buffer, scales={"adapter": run.adapter_scale, "head": run.head_scale},
                clip_norm=clip_norm, noise_multiplier=noise_multiplier * (1 + ROUNDING[self.precision]),
                expected_batch_size=run.expected_batch, noise=noise))
        drawn: list[int] = []
        loss = 0.0
        try:
            with self._dropout(run.dropout, sampling), _memory_advice():
                for _ in range(run.local_steps):
                    indices = poisson(len(records), sampling_rate, sampling)
                    losses = self._accumulate(step, records, indices, stop)
                    if losses is None:
                        break
                    step.finish(losses, len(indices))
                    drawn.append(len(indices))
                    loss += losses
        finally:  # a round that failed must leave no record's gradient to the next one
            step.close()
            for parameter, _ in self._parameters:
                parameter.grad = None
        total = sum(drawn)
        return TrainResult(
            tensors=self.adapted.read("trained"), steps=len(drawn), drawn=tuple(drawn),
            mean_loss=loss / total if total else float("nan"), clipped_share=step.clipped / total if total else 0.0,
            nonfinite=step.nonfinite)

    def _accumulate(self, step: _Step, records: Records, indices: np.ndarray,
                    stop: Callable[[], bool]) -> float | None:
        """Sum the drawn records' gradients; returns the sum of their losses, or None if stopped."""
        losses = 0.0
        if stop():
            return None
        for length, part in self.layout(records, indices):
            if stop():
                return None
            batch = self.task.collate(records, part, length, self.device)
            step.begin(len(part))
            with self.autocast():
                per_record = self.task.per_record_loss(self.adapted.model, batch)
            assert per_record.shape == (len(part),), "a task gives one loss for each record"
            step.add(per_record)
            losses += float(per_record.detach().sum())
        return losses

    def layout(self, records: Records, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(padded length, indices) of each micro-batch of a draw."""
        if self.micro_batch is not None:
            return micro_batches(records.lengths, indices, self.task.max_length, most=self.micro_batch)
        return micro_batches(records.lengths, indices, self.task.max_length,
                             most=max(1, BUFFER_BYTES // (4 * self.buffer.values)),
                             tokens=MICRO_BATCH_TOKENS[self.device.type])

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision's context, to call the model in."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextlib.contextmanager
    def _dropout(self, rate: float, seed: Stream) -> Iterator[None]:
        """Adapter dropout alone is in training mode, and repeats with the sampling stream."""
        if rate == 0:
            yield
            return
        layers = [module for name, module in self.adapted.model.named_modules() if ".lora_dropout." in name]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seed.uniform(1)[0] * 2**53))
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                for layer in layers:
                    layer.eval()


class _Step(ABC):
    """How gradients of micro-batches become one step."""

    clipped = 0
    nonfinite = 0

    def begin(self, records: int) -> None:  # noqa: B027 (a step may have nothing to do here)
        """Before the forward pass of a micro-batch."""

    @abstractmethod
    def add(self, per_record: torch.Tensor) -> None:
        """Backward pass of a micro-batch."""

    @abstractmethod
    def finish(self, losses: float, drawn: int) -> None:
        """The draw is complete; it may have been empty."""

    def close(self) -> None:  # noqa: B027 (nor here)
        """No more steps; drop what is unfinished."""


class _PlainStep(_Step):
    """Autograd's sum over the records, divided by the same constant as the private step."""

    def __init__(self, optimizer: torch.optim.Optimizer, divisor: float) -> None:
        self.optimizer, self.divisor = optimizer, divisor
        self.optimizer.zero_grad()

    def add(self, per_record: torch.Tensor) -> None:
        (per_record.sum() / self.divisor).backward()

    def finish(self, losses: float, drawn: int) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # an empty draw is a step with a zero gradient, as in the private case
                    parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _PrivateStep(_Step):
    """Clip and sum each micro-batch; noise once for each draw."""

    def __init__(self, optimizer: PerRecordOptimizer) -> None:
        self.optimizer = optimizer

    def begin(self, records: int) -> None:
        self.optimizer.buffer.arm(records)

    def add(self, per_record: torch.Tensor) -> None:
        per_record.sum().backward()
        self.optimizer.signal_skip_step(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self, losses: float, drawn: int) -> None:
        optimizer = self.optimizer
        if losses > 0.01 * drawn and not optimizer.nonfinite and not optimizer.clipped_sum.any():
            raise RuntimeError("the drawn records have a loss but no gradient: the adapters are cut off from it. "
                               "Nothing was released; please report this with the model's type and the targets")
        optimizer.signal_skip_step(False)
        optimizer.step()
        optimizer.zero_grad()

    def close(self) -> None:
        self.optimizer.buffer.disarm()
        self.clipped, self.nonfinite = self.optimizer.clipped, self.optimizer.nonfinite


def _optimizer(name: str, lr: float, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


@contextlib.contextmanager
def _memory_advice() -> Iterator[None]:
    """Out of memory names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            raise MemoryError("training ran out of memory: lower --micro-batch (the result stays the same), lower "
                              "--max-length at the server, or use --precision bf16") from None
        raise
