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
from functools import partial

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.memory import memory_advice
from fedlora.plan import RunPlan
from fedlora.privacy.rng import RandomStream
from fedlora.records import Batch
from fedlora.tasks import Records, Task
from fedlora.training import rehearsal
from fedlora.training.accumulation import PlainStep, PrivateStep, Step
from fedlora.training.adjustments import Adjuster
from fedlora.training.batch_invariance import IN_MEMORY, Findings, Shapes
from fedlora.training.compiled import CompiledBlocks, check_compiles
from fedlora.training.gradient_buffer import GradientBuffer
from fedlora.training.graphs import GraphedPass
from fedlora.training.job import TrainingJob, TrainResult
from fedlora.training.loop import Client, run_steps
from fedlora.training.multi_client import SummedStep, Together, check_alike, stacked
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.optimizers import make_optimizer
from fedlora.training.precision import attend_with_mask, resolve_device, resolve_precision, store_frozen_weights
from fedlora.training.runtime_checks import FrozenCheck, GradientCheck, NoisePool, check_owners
from fedlora.training.sampling import GRAPH_LENGTHS, LENGTHS, PRIVATE_LENGTHS, micro_batches, records_at_once

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 2048, "mps": 4096}
"""Most padded tokens of a micro-batch where --micro-batch is not given. A constant, so that runs repeat bit for bit."""

PRIVATE_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 512}
"""The same with privacy, where a micro-batch of one record is filled up to as many. Less costs more passes, more costs
more filling."""

BUFFER_BYTES = 256 * 2**20
"""Most memory for the gradients of a micro-batch's records where --micro-batch is not given; and as much again for the
gradients of units that have several records."""


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

    Attributes:
        adapted: as it was given.
        active: the same, of whose trained tensors those train that `activate` named.

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
        self.noise_pool = NoisePool()
        self.few_shapes = self.device.type == "cuda"
        self.blocks: CompiledBlocks | None = None
        self._dropping = False
        self.active = adapted
        self._activated: tuple[str, ...] = ()
        self.findings = findings
        self.collect_into(GradientBuffer(_grouped(adapted)))
        if compiled:
            check_compiles(self.device)
            self.blocks = CompiledBlocks(model, adapted.trained_leaves())

    @property
    def compiles(self) -> bool:
        """Whether the model's blocks are compiled."""
        return self.blocks is not None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """For `Task.evaluate` on this trainer's model."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def collect_into(self, buffer: GradientBuffer) -> None:
        """Have the leaves that train write to this buffer."""
        self.buffer = buffer
        self._parameters = [parameter for _, parameter in self.active.trained_parameters()]
        self._graphed = GraphedPass(self.device) if self.few_shapes else None
        self._most_in_a_shape = self.most_rows
        self._shapes = Shapes({})
        self._shown_for: tuple[object, ...] = ()
        for leaf in self.adapted.trained_leaves():
            leaf.sink = None
        for leaf in self.active.trained_leaves():
            leaf.sink = buffer

    def activate(self, active: tuple[str, ...]) -> None:
        """Train these tensors from now on, and keep the others that could train as they are.

        Args:
            active: names of the layout's trained tensors; () for all of them.

        Raises:
            ValueError: one is none of them.
        """
        if active != self._activated:
            self.active = self.adapted.activated(active)
            self.collect_into(GradientBuffer(_grouped(self.active)))
            self._activated = active

    @training_advice()
    def rehearse(self) -> None:
        """See on made-up records that each has its own gradient and no other's: before a real one is charged.

        Raises:
            ValueError: it has not, as in a model that moves or mixes its batch; or gradients are not finite, or do not
                reach a tensor.
        """
        rehearsal.rehearse(self)

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
        shown_for = (run, self._activated, rows_per_unit, self.micro_batch, self.most_rows, torch.get_num_threads())
        if self._shown_for != shown_for:
            self._shapes = rehearsal.show_batch_invariance(self, run, self._most_of_a_draw(run, rows_per_unit))
            self._shown_for = shown_for
        return self._shapes

    @property
    def shapes(self) -> Shapes:
        """What `show_batch_invariance` found last."""
        return self._shapes

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

    def one_pass(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        """`_compute` of a batch in the processor's memory, by a CUDA graph where one can be recorded."""
        while self._graphed is not None and not self._dropping:
            try:
                compute = self._compute if self.blocks is None else self._compute_compiled
                return self._graphed(compute, batch, weights, self.buffer)
            except RuntimeError as error:  # what is wrong with the pass itself, it will say again
                if self.blocks is not None:
                    log.warning("Training goes on without --compile: %s", type(error).__name__)
                    self.blocks = None
                else:
                    log.info("Training goes on without CUDA graphs: %s", type(error).__name__)
                    self._graphed = None
                log.debug("Why", exc_info=True)
                if self.buffer.armed:
                    self.buffer.arm(len(batch.input_ids))
        return self._compute(batch.to(self.device), None if weights is None else weights.to(self.device))

    def _compute_compiled(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        assert self.blocks is not None
        with self.blocks():
            return self._compute(batch, weights)

    def train(self, job: TrainingJob, stop: Callable[[], bool] = lambda: False) -> TrainResult:
        """Do the plan's local steps of one client, with a fresh optimiser.

        Args:
            stop: asked between micro-batches; True discards the unfinished step and returns.

        Raises:
            MemoryError: naming the flags that help.
            RuntimeError: a runtime check found a fault (`fedlora.training.runtime_checks`).
        """
        return self._train([job], stop)[0]

    def train_together(self, jobs: Sequence[TrainingJob]) -> list[TrainResult]:
        """Do the local steps of several clients of one round in lockstep (`fedlora.training.multi_client`). Of one
        alone, it is `train`.

        Raises:
            ValueError: they differ in the plan or the frozen tensors, or have dropout, which cannot repeat.
        """
        return self._train(jobs, lambda: False)

    @training_advice()
    def _train(self, jobs: Sequence[TrainingJob], stop: Callable[[], bool]) -> list[TrainResult]:
        alone, job = len(jobs) == 1, jobs[0]
        self.activate(job.active)
        if not alone:
            check_alike(jobs, self.active)
        if job.start is not None:
            assert job.run.family == self.adapted.layout.family.name, "another adapter's"
            self.adapted.write(job.start)
        parameters = self._parameters
        if job.private:
            self._check_private(job, parameters, alone)
        frozen = FrozenCheck(self.active, parameters)
        clients, passes = self._alone(job) if alone else self._together(jobs)
        self._most_in_a_shape = self._most_of_a_draw(job.run, job.rows_of_a_unit)
        try:
            with self._dropout(job.run.dropout, clients[0].sampling):
                run_steps(passes, clients, stop)
            frozen.check()  # first: launched while a GPU is still at work
            for client in clients:
                client.step.check()
        finally:  # a round that failed must leave no record's gradient to the next one
            self._most_in_a_shape = self.most_rows
            for client in clients:
                client.step.close()
            self.buffer.route({}, None)
            self.buffer.disarm()
            for parameter in parameters:
                parameter.grad = None
        results = [client.result(self.active.read("trained") if alone else {
            name: parameter.detach().cpu().numpy().copy() for name, parameter in client.trained.items()})
            for client in clients]
        self.noise_pool.check()
        return results

    def _check_private(self, job: TrainingJob, parameters: list[nn.Parameter], alone: bool) -> None:
        """What must hold before a record is read privately."""
        if job.run.dropout:
            raise ValueError(f"dropout is {job.run.dropout:g}: a record's mask depends on the others in its batch, so "
                             "that no clipping protects it. Train privately with dropout 0")
        check_owners(self.active, parameters)
        if alone:
            self.show_batch_invariance(job.run, job.rows_of_a_unit)

    def _alone(self, job: TrainingJob) -> tuple[list[Client], Alone]:
        """One client, on the model's own tensors."""
        client = Client(job, self.active.layout, self.active.parameters(), self.buffer, self.make_step)
        return [client], Alone(self, private=job.private)

    def _together(self, jobs: Sequence[TrainingJob]) -> tuple[list[Client], Together]:
        """Several clients, each on tensors of its own, to which the buffer routes their records."""
        layout = self.active.layout
        stacks, own = stacked(jobs, self.active, self.device)
        groups = [(spec.name, spec.group) for spec in layout.trained]
        clients, first = [], 0
        for job, mine in zip(jobs, own, strict=True):
            buffer = GradientBuffer([(mine[name], group) for name, group in groups])
            clients.append(Client(job, layout, mine, buffer, partial(self.make_step, summed=True), first))
            first += len(job.records)
        return clients, Together(self.buffer, stacks, self.most_rows, self.micro_batches, self.fill_buffer)

    def make_step(self, job: TrainingJob, parameters: Mapping[str, nn.Parameter], buffer: GradientBuffer,
                  gradients: GradientCheck, *, summed: bool = False) -> Step:
        """How the job's gradients become its steps. `summed`: without privacy, from the buffer in place of autograd."""
        run, layout = job.run, self.active.layout
        inner = make_optimizer(run.optimizer, [parameters[spec.name] for spec in layout.trained], job.rate)
        adjust = Adjuster.of(run.adjustment, layout, parameters)
        if job.noise_multiplier is None:
            divisor = plain_divisor(run, job.records, job.sampling_rate)
            return SummedStep(inner, divisor, buffer, adjust) if summed else PlainStep(inner, divisor, adjust)
        return PrivateStep(PerRecordOptimizer(
            inner, buffer, scales={"adapter": run.adapter_scale, "head": run.head_scale}, clip_norm=job.clip_norm,
            noise_multiplier=job.noise_multiplier, expected_batch_size=run.expected_batch, noise=job.stream("noise"),
            pool=self.noise_pool, adjust=adjust), gradients)

    @property
    def most_rows(self) -> int:
        """How many gradients are held at once."""
        return max(1, BUFFER_BYTES // (4 * self.buffer.values))

    def micro_batches(self, records: Records, indices: np.ndarray, *,
               private: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """(padded length, places in `indices`) of each micro-batch of these records."""
        return micro_batches(records.lengths[indices], np.arange(len(indices)), self.task.max_length,
                             partial(self.rows_of, private=private), self.ladder(private))

    def ladder(self, private: bool) -> tuple[int, ...]:
        """The lengths to which records are padded."""
        return GRAPH_LENGTHS if self.few_shapes else PRIVATE_LENGTHS if private else LENGTHS

    def rows_of(self, length: int, *, private: bool = False) -> int:
        """Most records of a micro-batch of this length; with privacy, and where shapes are few, its rows."""
        if private:
            assert length in self.shapes.rows, "private training follows show_batch_invariance"
            return self.shapes.rows[length]
        most = self.most_rows if self.micro_batch is None else self.micro_batch
        if self.few_shapes:  # shapes are filled up
            most = min(most, self._most_in_a_shape)
        return records_at_once(length, most, self._tokens(MICRO_BATCH_TOKENS))

    def private_rows(self, length: int, most_of_a_draw: int) -> int:
        """Rows of the first shape to try for private micro-batches of this length: a power of two, which processors
        split evenly, unless --micro-batch says otherwise. It follows from public values alone.
        """
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
        layers = self.adapted.dropouts()
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


class Alone:
    """Passes of one client: filled up to the shapes shown for privacy, or to those that a GPU has recorded."""

    def __init__(self, trainer: Trainer, *, private: bool) -> None:
        self._trainer, self._private = trainer, private
        self.most_rows = trainer.most_rows

    def micro_batches(self, records: Records, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        return self._trainer.micro_batches(records, indices, private=self._private)

    def through(self, records: Records, indices: np.ndarray, length: int, clients: Sequence[Client],
                owners: np.ndarray, places: np.ndarray) -> None:
        [client], trainer, count = clients, self._trainer, len(indices)
        rows = trainer.rows_of(length, private=self._private) if self._private or trainer.few_shapes else count
        client.step.begin(rows)
        losses = trainer.one_pass(trainer.task.collate(records, indices, length, rows=rows),
                                  client.step.weights(places, rows))
        client.losses.append(losses[:count].sum())
        client.step.take(places)


def _grouped(adapted: AdaptedModel) -> list[tuple[nn.Parameter, str]]:
    return [(parameter, spec.group) for spec, parameter in adapted.trained_parameters()]


def plain_divisor(run: RunPlan, records: Records, sampling_rate: float) -> float:
    """By which a step without privacy is divided: the expected batch; a client with fewer units than that uses all of
    them, and their mean.
    """
    return run.expected_batch if sampling_rate < 1 else records.units_count


def check_computing(device: str, precision: str, compiled: bool) -> None:
    """ValueError where this machine cannot train so; asked before anything is loaded. Arguments as of `Trainer`."""
    resolved = resolve_device(device)
    resolve_precision(precision, resolved)
    if compiled:
        check_compiles(resolved)
