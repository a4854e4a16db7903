"""The trainer: one round of local training, with or without privacy.

Training uses the same sampler, batches and loss with and without privacy. Under privacy, each unit's gradient is
clipped, and noise is added to the sum (`fedlora.training.optimizer`). The guarantee protects one unit of this client (a
record, or for example all records of a patient) under zero-out adjacency. It covers the trained tensors. Of
`TrainResult`, only these and the number of steps may leave the machine.
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
from typing_extensions import override

from fedlora.adapters import AdaptedModel
from fedlora.memory import memory_advice
from fedlora.plan import RunPlan, Tensors
from fedlora.privacy.rng import RandomStream
from fedlora.records import Batch
from fedlora.tasks import Records, Task
from fedlora.training import hold_out, rehearsal
from fedlora.training.accumulation import PlainStep, PrivateStep, Step, SumStep
from fedlora.training.adjustments import Adjuster
from fedlora.training.batch_invariance import IN_MEMORY, Findings, Shapes
from fedlora.training.compiled import CompiledBlocks, check_compiles
from fedlora.training.gradient_buffer import GradientBuffer
from fedlora.training.graphs import GraphedPass
from fedlora.training.job import TrainingJob, TrainResult
from fedlora.training.loop import Client, Passes, run_steps
from fedlora.training.multi_client import SummedStep, Together, check_alike, stacked
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.optimizers import make_optimizer
from fedlora.training.precision import attend_with_mask, resolve_device, resolve_precision, store_frozen_weights
from fedlora.training.runtime_checks import FrozenCheck, GradientCheck, NoisePool, check_owners
from fedlora.training.sampling import GRAPH_LENGTHS, LENGTHS, PRIVATE_LENGTHS, micro_batches, records_at_once

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 2048, "mps": 4096}
"""The most padded tokens of a micro-batch, by device, where --micro-batch is not given.

They are constants so that runs repeat bit for bit."""

PRIVATE_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 512}
"""The same under privacy, where even a micro-batch of one record is filled up to this size.

Smaller values cost more passes, larger ones more filler rows."""

BUFFER_BYTES = 256 * 2**20
"""The most memory, in bytes, for the gradients of a micro-batch's records where --micro-batch is not given.

The gradients of units with several records may take as much again."""


training_advice = partial(memory_advice, "training", "lower --micro-batch (the result stays the same), lower "
                                                     "--max-length at the server, or use --precision bf16")


class Trainer:
    """The trainer of a process: it holds the model and its buffers over all rounds and all simulated clients.

    Args:
        adapted: The model with its adapters. It is moved to the device; with bf16, its frozen weights are converted.
        task: Makes micro-batches and computes per-record losses.
        device: The device as on the command line: "auto", "cpu", "cuda" or "mps".
        precision: The precision as on the command line: "auto", "fp32" or "bf16".
        micro_batch: The most records to compute at once; None for a limit on tokens.
        threads: The number of CPU threads; None leaves PyTorch's default.
        compiled: Whether to compile the model's blocks; on CUDA only.
        findings: The memory of the shapes that were shown to be batch-invariant.

    Attributes:
        adapted: The model with its adapters, as given.
        active: The same model, with the tensors that `activate` chose as its trained ones.
        device: The device in use.
        precision: The precision in use, "fp32" or "bf16".
        buffer: The gradient buffer that the trained layers write to.
        noise_pool: The noise of the run so far, for the runtime check.
        few_shapes: Whether all micro-batches are filled up to a few shapes, as on CUDA.
        blocks: The compiled blocks; None without compilation.

    Raises:
        ValueError: This machine cannot compute in this way.
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
        if self.precision == "bf16":  # before the move, so that the device never holds the weights in float32
            # the adapter's state, which is sent and received, stays in float32
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
        self._activated: tuple[tuple[str, ...], tuple[tuple[str, int], ...]] = (), ()
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
        """The dtype to evaluate this trainer's model in (for `Task.evaluate`); None for float32."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def collect_into(self, buffer: GradientBuffer) -> None:
        """Let the layers that train write their gradients to this buffer."""
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

    def activate(self, active: tuple[str, ...], prefixes: tuple[tuple[str, int], ...] = ()) -> None:
        """Choose the tensors to train from now on, and their ranks. Other tensors keep their values.

        Args:
            active: Names of trained tensors of the layout; () for all of them.
            prefixes: (module, rank) of the adapted modules of which only the first ranks are used and trained.

        Raises:
            ValueError: A name is not one of them, or a rank does not fit.
        """
        if (active, prefixes) != self._activated:
            self.active = self.adapted.activated(active, dict(prefixes))
            self.collect_into(GradientBuffer(_grouped(self.active)))
            self._activated = active, prefixes
        self.active.take_place()  # an evaluation may have put the whole tensors into the model since

    @training_advice()
    def rehearse(self) -> None:
        """Test on made-up records, before a real one is charged, that the model can be trained under privacy.

        Each record must have its own gradient, which depends on no other record.

        Raises:
            ValueError: The model mixes or reorders the records of a batch, or depends on the padding; or gradients are
                not finite, or do not reach a tensor.
            MemoryError: The memory does not suffice. The message names the flags that help.
        """
        rehearsal.rehearse(self)

    @training_advice()
    def show_batch_invariance(self, run: RunPlan, rows_per_unit: int = 1) -> Shapes:
        """Find the shapes of private micro-batches, and test on this machine that they are batch-invariant.

        `fedlora.training.batch_invariance` explains why. `train` calls it; a caller that charges for a training calls
        it before the charge. Shapes that were found before are remembered. The largest one is computed in any case, so
        that a lack of memory shows before anything is charged.

        Args:
            run: The plan that will be trained.
            rows_per_unit: The most records of one unit in a step; 1 where each record is a unit.

        Raises:
            ValueError: This machine does not even compute the same gradient twice.
            MemoryError: The memory does not suffice. The message names the flags that help.
        """
        shown_for = (run, self._activated, rows_per_unit, self.micro_batch, self.most_rows, torch.get_num_threads())
        if self._shown_for != shown_for:
            self._shapes = rehearsal.show_batch_invariance(self, run, self._most_of_a_draw(run, rows_per_unit))
            self._shown_for = shown_for
        return self._shapes

    @property
    def shapes(self) -> Shapes:
        """The shapes that `show_batch_invariance` found last."""
        return self._shapes

    def fill_buffer(self, records: Records, indices: np.ndarray, length: int) -> torch.Tensor:
        """Leave the gradient of each of these records in the buffer, and return [records] losses.

        Args:
            records: All records.
            indices: The records to compute.
            length: The length in tokens to pad them to.
        """
        self.buffer.arm(len(indices))
        losses = self._compute(self.task.collate(records, indices, length, self.device), None)
        self.buffer.check_complete()
        return losses

    def _compute(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        """Run the backward pass of the sum of the losses, weighted if there are weights; return [records] losses."""
        with self.autocast():
            losses = self.task.per_record_loss(self.adapted.model, batch)
        assert losses.shape == batch.input_ids.shape[:1], "a task must return one loss for each record"
        (losses if weights is None else losses * weights).sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def one_pass(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        """Compute a batch from the processor's memory, by a CUDA graph where one can be recorded.

        It runs the backward pass of the sum of the losses. The gradients end up in the buffer if it is armed, else in
        the parameters.

        Args:
            batch: The batch.
            weights: [records] The losses' weights in the sum; None for 1.

        Returns:
            [records] losses. The next pass may overwrite them.
        """
        while self._graphed is not None and not self._dropping:
            try:
                compute = self._compute if self.blocks is None else self._compute_compiled
                return self._graphed(compute, batch, weights, self.buffer)
            except RuntimeError as error:  # an error of the pass itself will be raised again without a graph
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

    def train(self, job: TrainingJob, stop: Callable[[], bool] = lambda: False,
              stepped: Callable[[int], object] = lambda steps: None) -> TrainResult:
        """Do one client's local steps of a round, with a fresh optimizer.

        Args:
            job: The client's training task.
            stop: Asked between micro-batches. True discards the unfinished step and ends the training.
            stepped: Told after every step how many are done. It must return at once.

        Returns:
            The trained tensors, and what happened.

        Raises:
            ValueError: The job asks for something that this model or machine cannot do, such as dropout under privacy.
            MemoryError: The memory does not suffice. The message names the flags that help.
            RuntimeError: A runtime check found a fault (`fedlora.training.runtime_checks`).
        """
        return self._train([job], stop, stepped)[0]

    def train_together(self, jobs: Sequence[TrainingJob]) -> list[TrainResult]:
        """Do the local steps of several clients of one round in lockstep (`fedlora.training.multi_client`).

        With a single job, this is `train`.

        Args:
            jobs: The clients' training tasks.

        Returns:
            The clients' results, in the order of the jobs.

        Raises:
            ValueError: The clients differ in the plan, the active or the frozen tensors or the ranks, or the plan has
                dropout.
            MemoryError: The memory does not suffice. The message names the flags that help.
            RuntimeError: A runtime check found a fault.
        """
        return self._train(jobs, lambda: False, lambda steps: None)

    @training_advice()
    def _train(self, jobs: Sequence[TrainingJob], stop: Callable[[], bool],
               stepped: Callable[[int], object]) -> list[TrainResult]:
        alone, job = len(jobs) == 1, jobs[0]
        self.activate(job.active, job.prefixes)
        if not alone:
            check_alike(jobs, self.active)
        if job.start is not None:
            assert job.run.family == self.adapted.layout.family.name, "the job is for another adapter family"
            self.active.write(job.start)
        parameters = self._parameters
        if job.private:
            self._check_private(job, parameters, alone)
        frozen = FrozenCheck(self.active, parameters)
        clients, passes = self._alone(job) if alone else self._together(jobs)
        self._most_in_a_shape = self._most_of_a_draw(job.run, job.rows_of_a_unit)
        try:
            with self._dropout(job.run.dropout, clients[0].sampling):
                run_steps(passes, clients, stop, stepped)
            frozen.check()  # first, because it can be launched while a GPU is still at work
            for client in clients:
                client.step.check()
        finally:  # after a failed round too, no record's gradient may be left to the next one
            self._most_in_a_shape = self.most_rows
            for client in clients:
                client.step.close()
            self.buffer.route({}, None)
            self.buffer.disarm()
            for parameter in parameters:
                parameter.grad = None
        results = [client.result(self._released(client, alone)) for client in clients]
        self.noise_pool.check()
        return results

    def _released(self, client: Client, alone: bool) -> Tensors:
        """Return what a client releases after its steps: the trained tensors, or the integers of a secure sum."""
        if client.step.result is not None:
            return client.step.result
        return self.active.read("trained") if alone else {
            name: parameter.detach().cpu().numpy().copy() for name, parameter in client.trained.items()}

    def _check_private(self, job: TrainingJob, parameters: list[nn.Parameter], alone: bool) -> None:
        """Check what must hold before a record is read under privacy.

        Raises:
            ValueError: The plan has dropout, or this machine is not batch-invariant.
            RuntimeError: The tensors to be trained are not the model's.
        """
        if job.run.dropout:
            raise ValueError(f"dropout is {job.run.dropout:g}: a record's mask depends on the others in its batch, so "
                             "that clipping would not protect it. Train privately with dropout 0")
        check_owners(self.active, parameters)
        if alone:
            self.show_batch_invariance(job.run, job.rows_of_a_unit)

    def _alone(self, job: TrainingJob) -> tuple[list[Client], Alone]:
        """Prepare one client to train on the model's own tensors."""
        client = Client(job, self.active.layout, self.active.parameters(), self.buffer, self.make_step)
        return [client], Alone(self, private=job.private)

    def _together(self, jobs: Sequence[TrainingJob]) -> tuple[list[Client], Together]:
        """Prepare several clients, each with tensors of its own, to which the buffer routes its records."""
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
        """Make the object that turns a job's gradients into optimizer steps.

        Args:
            job: The training task.
            parameters: Tensor name → parameter, for the whole of the layout's state.
            buffer: The buffer with the gradients of the client's records.
            gradients: The runtime check that sees each draw.
            summed: Without privacy: whether to sum the rows of the buffer, where autograd would sum otherwise.
        """
        run, layout = job.run, self.active.layout
        inner = make_optimizer(run.optimizer, [parameters[spec.name] for spec in layout.trained], job.rate)
        adjust = Adjuster.of(run.adjustment, layout, parameters)
        if adjust is not None:
            adjust.follow(inner)
        if job.noise_multiplier is None:
            divisor = plain_divisor(run, job.records, job.sampling_rate)
            return SummedStep(inner, divisor, buffer, adjust) if summed else PlainStep(inner, divisor, adjust)
        optimizer = PerRecordOptimizer(
            inner, buffer, scales={"adapter": run.adapter_scale, "head": run.head_scale}, clip_norm=job.clip_norm,
            noise_multiplier=job.noise_multiplier, expected_batch_size=run.expected_batch, noise=job.stream("noise"),
            pool=self.noise_pool, adjust=adjust)
        if job.encoding is None:
            return PrivateStep(optimizer, gradients)
        columns = {id(slot.parameter): slot.columns for slot in buffer.slots}
        order = [np.r_[columns[id(parameters[spec.name])]] for spec in layout.trained]
        return SumStep(optimizer, gradients, job.encoding, np.concatenate(order), self._scored(job))

    def _scored(self, job: TrainingJob) -> np.ndarray:
        """Return what the job's held-out records add to its sum, before the model changes; nothing without them."""
        if job.held_out is None:
            return np.zeros(0)
        if job.start is not None:  # in lockstep the model holds another client's tensors; the frozen ones are the same
            self.active.write({spec.name: job.start[spec.name] for spec in self.active.layout.trained})
        return hold_out.scored(job, self.adapted, self.task, device=self.device, autocast_dtype=self.autocast_dtype)

    @property
    def most_rows(self) -> int:
        """The most rows of gradients that are held in memory at once."""
        return max(1, BUFFER_BYTES // (4 * self.buffer.values))

    def micro_batches(self, records: Records, indices: np.ndarray, *,
                      private: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """Split records into micro-batches.

        Args:
            records: All records.
            indices: [n] The records to split.
            private: Whether the micro-batches are for private training.

        Returns:
            An iterator over (padded length, positions in `indices`).
        """
        return micro_batches(records.lengths[indices], np.arange(len(indices)), self.task.max_length,
                             partial(self.rows_of, private=private), self.ladder(private))

    def ladder(self, private: bool) -> tuple[int, ...]:
        """Return the lengths to which records are padded."""
        return GRAPH_LENGTHS if self.few_shapes else PRIVATE_LENGTHS if private else LENGTHS

    def rows_of(self, length: int, *, private: bool = False) -> int:
        """Return the most records of a micro-batch of a padded length.

        Where micro-batches are filled up (under privacy, and on CUDA), this is the number of their rows.
        """
        if private:
            assert length in self.shapes.rows, "private training follows show_batch_invariance"
            return self.shapes.rows[length]
        most = self.most_rows if self.micro_batch is None else self.micro_batch
        if self.few_shapes:  # micro-batches are filled up, so no more rows than a usual draw has
            most = min(most, self._most_in_a_shape)
        return records_at_once(length, most, self._tokens(MICRO_BATCH_TOKENS))

    def private_rows(self, length: int, most_of_a_draw: int) -> int:
        """Return the number of rows to try first for private micro-batches of a padded length.

        It is a power of two, which processors split evenly, unless --micro-batch says otherwise. It follows from public
        values alone.

        Args:
            length: The padded length.
            most_of_a_draw: The usual number of records in a draw, rounded up. More rows would mostly be fillers.
        """
        if self.micro_batch is not None:
            return min(self.micro_batch, most_of_a_draw)
        rows = records_at_once(length, min(self.most_rows, most_of_a_draw), self._tokens(PRIVATE_TOKENS))
        power: int = 2 ** int(math.log2(rows))
        return power

    def _tokens(self, most: Mapping[str, int]) -> int | None:
        """Return the most padded tokens of a micro-batch; None if --micro-batch limits its records."""
        return None if self.micro_batch is not None else min(most[self.device.type], self.task.most_tokens)

    @staticmethod
    def _most_of_a_draw(run: RunPlan, rows_per_unit: int) -> int:
        """Return the expected number of records in a draw, rounded up to a power of two.

        Units with fewer than `rows_per_unit` records count as if they had that many.
        """
        power: int = 2 ** math.ceil(math.log2(run.expected_batch * rows_per_unit))
        return power

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context to call the model in, which sets the precision."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextlib.contextmanager
    def _dropout(self, rate: float, seed: RandomStream) -> Iterator[None]:
        """Switch the adapters' dropout on for a while, with random numbers that follow from the sampling stream.

        All other dropout of the model stays off.
        """
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


class Alone(Passes):
    """Passes of a single client.

    Under privacy and on CUDA, micro-batches are filled up with filler rows: to the shapes that were shown to be
    batch-invariant, or to those that CUDA graphs are recorded for.

    Args:
        trainer: The trainer whose model is used.
        private: Whether the client trains under privacy.
    """

    def __init__(self, trainer: Trainer, *, private: bool) -> None:
        self._trainer, self._private = trainer, private
        self.most_rows = trainer.most_rows

    @override
    def micro_batches(self, records: Records, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        return self._trainer.micro_batches(records, indices, private=self._private)

    @override
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
    """Return the number that a step without privacy is divided by.

    It is the expected batch. A client with fewer units than that uses all of them in every step, and takes their mean.

    Args:
        run: The run's plan.
        records: The client's records.
        sampling_rate: q. At 1, every unit enters every step.
    """
    return run.expected_batch if sampling_rate < 1 else records.units_count


def check_computing(device: str, precision: str, compiled: bool) -> None:
    """Check, before anything is loaded, that this machine can train in this way.

    Args:
        device: The device as on the command line.
        precision: The precision as on the command line.
        compiled: Whether to compile the model's blocks.

    Raises:
        ValueError: This machine cannot train in this way.
    """
    resolved = resolve_device(device)
    resolve_precision(precision, resolved)
    if compiled:
        check_compiles(resolved)
