"""Local training of one round, with or without privacy: the same sampler, the same batches, the same loss.

Privately, each unit's gradient is clipped and the sum is noised (`fedlora.training.optimizer`); the guarantee is for
one unit of this client under zero-out: a record, or all records of a patient, say. It holds for the tensors alone.
Everything else in `TrainResult` is private.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.memory import memory_advice
from fedlora.plan import RunPlan, Tensors
from fedlora.privacy.rng import RandomStream, RunStreams
from fedlora.tasks import Records, Task
from fedlora.tasks.records import Batch
from fedlora.training.accumulation import PlainStep, PrivateStep, Step
from fedlora.training.batch_invariance import (
    IN_MEMORY,
    Findings,
    Shapes,
    content_dependent,
    key_of,
    made_up_records,
    show_shapes,
)
from fedlora.training.compiled import CompiledBlocks, check_compiles
from fedlora.training.graphs import GraphedPass
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.per_example import GradientBuffer, per_example, row_norms
from fedlora.training.precision import attend_with_mask, resolve_device, resolve_precision, store_frozen_weights
from fedlora.training.runtime_checks import (
    FrozenCheck,
    GradientCheck,
    NoisePool,
    check_owners,
    tell_finite,
    tells,
)
from fedlora.training.sampling import (
    GRAPH_LENGTHS,
    LENGTHS,
    PRIVATE_LENGTHS,
    Draw,
    Sampler,
    lengths_up_to,
    micro_batches,
    records_at_once,
)

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 2048, "mps": 4096}
"""Most padded tokens of a micro-batch where --micro-batch is not given. A constant, so that runs repeat bit for bit."""

PRIVATE_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 512}
"""The same with privacy, where a micro-batch of one record is filled up to as many. Less costs more passes, more costs
more filling."""

BUFFER_BYTES = 256 * 2**20
"""Most memory for the gradients of a micro-batch's records where --micro-batch is not given; and as much again for the
gradients of units that have several records."""

_APART = {"fp32": 1e-3, "bf16": 0.3}
"""By so much, relative to its norm, may a record's gradient differ by what it is padded to."""

ROWS_PER_UNIT = 8
"""Most records of one unit in a step, where it is not given."""


@dataclass(frozen=True)
class TrainingJob:
    """What one client has trained in one round: settled, charged, and good for one training in any process.

    Attributes:
        run, records: of the client.
        start: the tensors to start from, all that is not in the base checkpoint.
        sampling_rate, noise_multiplier, clip_norm, lr, rows_per_unit: as of `Trainer.train`.
        streams, round, attempt: where the random numbers come from.
    """

    run: RunPlan
    records: Records
    start: Tensors
    sampling_rate: float
    noise_multiplier: float | None
    clip_norm: float
    lr: float
    rows_per_unit: int
    streams: RunStreams
    round: int
    attempt: int

    def stream(self, purpose: str) -> RandomStream:
        """For "sampling" or "noise"; made anew by each call."""
        return self.streams.stream(self.round, purpose, self.attempt)


@dataclass(frozen=True)
class TrainResult:
    """What a round gave. Under privacy only `tensors` and `steps` may leave the machine.

    Attributes:
        tensors: the trained tensors.
        steps: optimiser steps done; fewer than planned if training was stopped.
        drawn: number of units of each step.
        mean_loss: over the drawn records; nan if there were none.
        clipped_share: share of drawn units whose gradient was longer than the clip norm; 0.0 without privacy.
        nonfinite: drawn records whose gradient was not finite, and counted as zero.
    """

    tensors: Tensors
    steps: int
    drawn: tuple[int, ...]
    mean_loss: float
    clipped_share: float
    nonfinite: int


training_advice = partial(memory_advice, "training", "lower --micro-batch (the result stays the same), lower "
                                                     "--max-length at the server, or use --precision bf16")


class Trainer:
    """One per process: holds the model and its buffers over rounds and over simulated clients.

    Args:
        adapted: the model with its adapters; moved to the device, and with bf16 its frozen weights are stored so.
        task: gives micro-batches and per-record losses.
        device, precision: as on the command line; "auto" is resolved.
        micro_batch: most records computed at once; None for a bound on tokens.
        threads: of the CPU; None leaves PyTorch's default.
        compiled: have the model's blocks compiled, on CUDA.
        findings: what was shown of batch invariance before.
    Raises:
        ValueError: this machine cannot compute so.
    """

    @training_advice()
    def __init__(self, adapted: AdaptedModel, task: Task, *, device: str = "auto", precision: str = "auto",
                 micro_batch: int | None = None, threads: int | None = None, compiled: bool = False,
                 findings: Findings = IN_MEMORY) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"--micro-batch is {micro_batch}; it must be at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        self.adapted, self.task, self.micro_batch = adapted, task, micro_batch
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        if self.precision == "bf16":  # before they are moved: the device never holds them in float32
            # what travels stays in float32
            keep = {id(adapted.parameter(spec.name)) for spec in adapted.layout.state}
            store_frozen_weights(adapted.model, torch.bfloat16, keep=keep)
        if self.device.type != "mps":
            attend_with_mask(adapted.model, self.device)
        model: nn.Module = adapted.model
        model.to(self.device).eval()
        self._parameters = [(parameter, spec.group) for spec, parameter in adapted.trained_parameters()]
        self.buffer = GradientBuffer(self._parameters)
        self.noise_pool = NoisePool()
        self._few_shapes = self.device.type == "cuda"
        self._graphed = GraphedPass(self.device) if self._few_shapes else None
        self._blocks: CompiledBlocks | None = None
        self._dropping = False
        self._most_in_a_shape = self.most_rows
        self._findings = findings
        self._shapes = Shapes({})
        self._shown_for: tuple[object, ...] = ()
        leaves = [leaf for leaf, _ in adapted.trained_leaves()]
        per_example(leaves, self.buffer)
        if compiled:
            check_compiles(self.device)
            self._blocks = CompiledBlocks(model, leaves)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """For `Task.evaluate` on this trainer's model."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @training_advice()
    def rehearse(self) -> None:
        """See on made-up records that each has its own gradient and no other's: before a real one is charged.

        Raises:
            ValueError: it has not, as in a model that moves or mixes its batch; or gradients are not finite, or do not
                reach a tensor.
        """
        length = max(2, min(8, self.task.max_length))
        records = self._made_up([length, length])
        with self._random_tensors():
            together = self._gradients(records, np.arange(3), length)
            alone = torch.cat([self._gradients(records, np.array([i]), int(records.lengths[i])) for i in range(3)])
        if not bool(together.isfinite().all()):
            raise ValueError("the model's gradients on made-up records are not finite; choose another --model, or "
                             "--precision fp32")
        cut_off = sum(not bool(together[:, slot.columns].any()) for slot in self.buffer.slots)
        if cut_off:
            raise ValueError(f"{cut_off} of the {len(self.buffer.slots)} tensors that are to be trained have no part "
                             "in the loss, and would be trained on noise alone; choose other --targets")
        if not bool((row_norms(together - alone) <= _APART[self.precision] * row_norms(alone)).all()):
            raise ValueError("the model does not keep the records of a batch apart: the gradient of one depends on the "
                             "others, so that no clipping protects it. Choose other --targets, or another --model")

    @training_advice()
    def show_batch_invariance(self, run: RunPlan, rows_per_unit: int = 1) -> Shapes:
        """Find the shapes of private micro-batches, and show on this machine that they are batch-invariant.

        See `fedlora.training.batch_invariance`. `train` asks for it, and before that whoever charges for a training.
        What was shown before is remembered; the largest shape is computed in any case, so that memory that is lacking
        is lacking now.

        Args:
            run: the plan that will be trained.
            rows_per_unit: most records of one unit in a step; 1 where each record is a unit.
        Raises:
            ValueError: this machine computes no shape so.
            MemoryError: naming the flags that help.
        """
        shown_for = (run, rows_per_unit, self.micro_batch, self.most_rows, torch.get_num_threads())
        if self._shown_for == shown_for:
            return self._shapes
        lengths = lengths_up_to(self.task.max_length, self._ladder(private=True))
        most = self._most_of_a_draw(run, rows_per_unit)
        one_at_a_time = content_dependent(self.adapted.model)
        first = {length: 1 if one_at_a_time else self._private_rows(length, most) for length in lengths}
        key = key_of(run, self.adapted.model, first, device=self.device, precision=self.precision,
                     compiled=self._blocks is not None)
        shapes, records = self._findings.get(key), self._made_up(lengths)
        with self._random_tensors():
            if shapes is None or sorted(shapes.rows) != lengths:
                shapes = show_shapes(self._filled_up, records, first, one_at_a_time)
                self._findings.put(key, shapes)
            else:
                largest = max(lengths, key=lambda length: length * shapes.rows[length])
                self._filled_up(records, np.array([2 * lengths.index(largest)]), largest, shapes.rows[largest])
        self._shapes, self._shown_for = shapes, shown_for
        return shapes

    @property
    def shapes(self) -> Shapes:
        """What `show_batch_invariance` found last."""
        return self._shapes

    def _filled_up(self, records: Records, indices: np.ndarray, length: int,
                   rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([rows, values] gradients, [rows] losses) of these records and filler rows after them."""
        self.buffer.arm(rows)
        losses = self._pass(self.task.collate(records, indices, length, rows=rows), None)
        self.buffer.check_complete()
        return self.buffer.computed, losses

    def _made_up(self, lengths: Sequence[int]) -> Records:
        embeddings: int = self.adapted.model.get_input_embeddings().weight.shape[0]  # type: ignore
        return made_up_records(self.task, embeddings, lengths)

    @contextlib.contextmanager
    def _random_tensors(self) -> Iterator[None]:
        """In it, the model holds random tensors, through which a record's rounding reaches all of its gradient."""
        random, before = np.random.default_rng(0), self.adapted.read("state")
        self.adapted.write({name: (0.1 * random.standard_normal(array.shape)).astype(np.float32)
                            for name, array in before.items()})
        try:
            yield
        finally:
            self.buffer.disarm()
            self.adapted.write(before)

    def fill_buffer(self, records: Records, indices: np.ndarray, length: int) -> torch.Tensor:
        """Leave the gradient of each of these records in the buffer, which is armed then; returns [records] losses."""
        self.buffer.arm(len(indices))
        losses = self._compute(self.task.collate(records, indices, length, self.device), None)
        self.buffer.check_complete()
        return losses

    def _compute(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        """[records] losses, after the backward pass of their sum, weighted if there are weights."""
        with self.autocast():
            losses = self.task.per_record_loss(self.adapted.model, batch)
        assert losses.shape == batch.input_ids.shape[:1], "a task gives one loss for each record"
        (losses if weights is None else losses * weights).sum().backward()
        return losses.detach()

    def _pass(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        """`_compute` of a batch in the processor's memory, by a CUDA graph where one can be recorded."""
        while self._graphed is not None and not self._dropping:
            try:
                compute = self._compute if self._blocks is None else self._compute_compiled
                return self._graphed(compute, batch, weights, self.buffer)
            except RuntimeError as error:  # what is wrong with the pass itself, it will say again
                if self._blocks is not None:
                    log.warning("Training goes on without --compile: %s", type(error).__name__)
                    self._blocks = None
                else:
                    log.info("Training goes on without CUDA graphs: %s", type(error).__name__)
                    self._graphed = None
                log.debug("Why", exc_info=True)
                if self.buffer.armed:
                    self.buffer.arm(len(batch.input_ids))
        return self._compute(batch.to(self.device), None if weights is None else weights.to(self.device))

    def _compute_compiled(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        assert self._blocks is not None
        with self._blocks():
            return self._compute(batch, weights)

    def _gradients(self, records: Records, indices: np.ndarray, length: int) -> torch.Tensor:
        """[records, values]: of each of these records."""
        self.fill_buffer(records, indices, length)
        return self.buffer.rows.clone()

    def run(self, training: TrainingJob, stop: Callable[[], bool] = lambda: False) -> TrainResult:
        """`train` as one client wants it in one round, from the tensors that it starts with."""
        layout = self.adapted.layout
        assert (training.run.family, training.run.scaling) == (layout.family.name, layout.scaling), "another adapter's"
        self.adapted.write(training.start)
        return self.train(
            training.run, training.records, sampling_rate=training.sampling_rate,
            noise_multiplier=training.noise_multiplier, clip_norm=training.clip_norm, lr=training.lr,
            rows_per_unit=training.rows_per_unit, sampling=training.stream("sampling"),
            noise=None if training.noise_multiplier is None else training.stream("noise"), stop=stop)

    def run_all(self, trainings: Sequence[TrainingJob]) -> list[TrainResult]:
        """`run` for several clients."""
        return [self.run(training) for training in trainings]

    @training_advice()
    def train(self, run: RunPlan, records: Records, *, sampling_rate: float, noise_multiplier: float | None,
              clip_norm: float, sampling: RandomStream, noise: RandomStream | None, lr: float | None = None,
              rows_per_unit: int = ROWS_PER_UNIT, stop: Callable[[], bool] = lambda: False) -> TrainResult:
        """Do the plan's local steps from the tensors that the model now holds, with a fresh optimiser.

        Args:
            sampling_rate: q of Poisson sampling over units; the step is divided by the plan's expected batch of units.
            noise_multiplier: None trains without privacy: no clipping, no noise.
            clip_norm: the client's, at most the plan's.
            sampling, noise: random streams of this round; noise is None without privacy.
            lr: the round's learning rate; None for the plan's.
            rows_per_unit: most records of one unit in a step; of no meaning where `records.units` is None.
            stop: asked between micro-batches; True discards the unfinished step and returns.
        Raises:
            MemoryError: naming the flags that help.
            RuntimeError: a runtime check found a fault (`fedlora.training.runtime_checks`).
        """
        rows_of_a_unit = 1 if records.units is None else rows_per_unit
        if noise is not None:
            if run.dropout:
                raise ValueError(f"dropout is {run.dropout:g}: a record's mask depends on the others in its batch, so "
                                 "that no clipping protects it. Train privately with dropout 0")
            check_owners(self.adapted, [parameter for parameter, _ in self._parameters])
            self.show_batch_invariance(run, rows_of_a_unit)
        if (noise_multiplier is None) != (noise is None):
            raise ValueError("a noise multiplier and a noise stream belong together; give both or neither")
        if not 0 < sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {sampling_rate!r}; it must be in (0, 1]")
        parameters = [parameter for parameter, _ in self._parameters]
        frozen = FrozenCheck(self.adapted, parameters)
        gradients = GradientCheck(self.adapted.layout, self.adapted.parameters(), self.buffer)
        sampler = Sampler(len(records), records.units, sampling_rate, rows_per_unit, sampling)
        inner = optimizer(run.optimizer, lr or run.lr, parameters)
        if noise_multiplier is None or noise is None:
            step: Step = PlainStep(inner, plain_divisor(run, records, sampling_rate))
        else:
            step = self.private_step(run, inner, self.buffer, gradients, clip_norm=clip_norm,
                                     noise_multiplier=noise_multiplier, noise=noise)
        drawn: list[int] = []
        losses, rows = [], 0
        self._most_in_a_shape = self._most_of_a_draw(run, rows_of_a_unit)
        try:
            with self._dropout(run.dropout, sampling):
                for _ in range(run.local_steps):
                    draw = sampler.draw()
                    loss = self._accumulate(step, records, draw, stop)
                    if loss is None:
                        break
                    step.finish(telling=partial(tells, records, draw.indices, loss))
                    drawn.append(len(draw))
                    losses.append(loss)
                    rows += len(draw.indices)
            frozen.check()  # first: launched while a GPU is still at work
            step.check()
        finally:  # a round that failed must leave no record's gradient to the next one
            self._most_in_a_shape = self.most_rows
            step.close()
            for parameter in parameters:
                parameter.grad = None
        tell_finite(rows, step.nonfinite)
        gradients.tell()
        self.noise_pool.check()
        total = sum(drawn)
        return TrainResult(
            tensors=self.adapted.read("trained"), steps=len(drawn), drawn=tuple(drawn),
            mean_loss=sum(map(float, losses)) / rows if rows else float("nan"),
            clipped_share=step.clipped / total if total else 0.0, nonfinite=step.nonfinite)

    def private_step(self, run: RunPlan, inner: torch.optim.Optimizer, buffer: GradientBuffer,
                     gradients: GradientCheck, *, clip_norm: float, noise_multiplier: float,
                     noise: RandomStream) -> PrivateStep:
        """The step that clips and noises what the buffer holds; arguments as of `train`."""
        return PrivateStep(PerRecordOptimizer(
            inner, buffer, scales={"adapter": run.adapter_scale, "head": run.head_scale}, clip_norm=clip_norm,
            noise_multiplier=noise_multiplier, expected_batch_size=run.expected_batch, noise=noise,
            pool=self.noise_pool), gradients)

    def _accumulate(self, step: Step, records: Records, draw: Draw, stop: Callable[[], bool]) -> torch.Tensor | None:
        """Sum the drawn units' gradients; returns the sum of their records' losses, or None if stopped."""
        losses: list[torch.Tensor] = []
        if stop():
            return None
        for group in draw.groups(self.most_rows):
            step.open(group)
            for length, places in self.micro_batches(records, group.indices, private=step.private):
                if stop():
                    return None
                count = len(places)
                filled = step.private or self._few_shapes
                rows = self._at_once(length, private=step.private) if filled else count
                step.begin(rows)
                batch = self.task.collate(records, group.indices[places], length, rows=rows)
                per_record = self._pass(batch, step.weights(places, rows))
                losses.append(per_record[:count].sum())
                step.take(places)
            step.shut()
        return torch.stack(losses).sum() if losses else torch.zeros(())

    @property
    def most_rows(self) -> int:
        """How many gradients are held at once."""
        return max(1, BUFFER_BYTES // (4 * self.buffer.values))

    def micro_batches(self, records: Records, indices: np.ndarray, *,
               private: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """(padded length, places in `indices`) of each micro-batch of these records."""
        return micro_batches(records.lengths[indices], np.arange(len(indices)), self.task.max_length,
                             partial(self._at_once, private=private), self._ladder(private))

    def _ladder(self, private: bool) -> tuple[int, ...]:
        """The lengths to which records are padded."""
        return GRAPH_LENGTHS if self._few_shapes else PRIVATE_LENGTHS if private else LENGTHS

    def _at_once(self, length: int, *, private: bool = False) -> int:
        """Most records of a micro-batch of this length; with privacy, and where shapes are few, its rows."""
        if private:
            assert length in self.shapes.rows, "private training follows show_batch_invariance"
            return self.shapes.rows[length]
        most = self.most_rows if self.micro_batch is None else self.micro_batch
        if self._few_shapes:  # shapes are filled up
            most = min(most, self._most_in_a_shape)
        return records_at_once(length, most, self._tokens(MICRO_BATCH_TOKENS))

    def _private_rows(self, length: int, most_of_a_draw: int) -> int:
        """Rows of the first shape to try for private micro-batches of this length: a power of two, which processors
        split evenly, unless --micro-batch says otherwise. It follows from public values alone."""
        if self.micro_batch is not None:
            return min(self.micro_batch, most_of_a_draw)
        rows = records_at_once(length, min(self.most_rows, most_of_a_draw), self._tokens(PRIVATE_TOKENS))
        return 2 ** int(math.log2(rows))

    def _tokens(self, most: Mapping[str, int]) -> int | None:
        """Most padded tokens of a micro-batch."""
        return None if self.micro_batch is not None else min(most[self.device.type], self.task.most_tokens)

    @staticmethod
    def _most_of_a_draw(run: RunPlan, rows_per_unit: int) -> int:
        """A power of two that the records of most draws are fewer than, or as many."""
        return 2 ** math.ceil(math.log2(run.expected_batch * rows_per_unit))

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision's context, to call the model in."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextlib.contextmanager
    def _dropout(self, rate: float, seed: RandomStream) -> Iterator[None]:
        """Adapter dropout alone is in training mode, and repeats with the sampling stream."""
        if rate == 0:
            yield
            return
        layers = [module for name, module in self.adapted.model.named_modules() if ".lora_dropout." in name]
        self._dropping = True
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seed.uniform(1)[0] * 2**53))
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                self._dropping = False
                for layer in layers:
                    layer.eval()


def plain_divisor(run: RunPlan, records: Records, sampling_rate: float) -> float:
    """By which a step without privacy is divided: the expected batch; a client with fewer units than that uses all of
    them, and their mean."""
    return run.expected_batch if sampling_rate < 1 else records.units_count


def check_computing(device: str, precision: str, compiled: bool) -> None:
    """ValueError where this machine cannot train so; asked before anything is loaded. Arguments as of `Trainer`."""
    resolved = resolve_device(device)
    resolve_precision(precision, resolved)
    if compiled:
        check_compiles(resolved)


def optimizer(name: str, lr: float, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh one, by its name in the plan."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
