"""CUDA graphs: the forward and backward pass of a micro-batch, launched as a whole and not kernel by kernel.

A GPU runs the thousands of kernels of a pass faster than Python can launch them. For 32 records of 64 tokens and a
Llama with 1 B parameters in bf16, the kernels keep an H100 busy for 31 ms, but the processor needs 96 ms to launch
them. A graph is recorded once for each shape [records, length]. It is then replayed on other records, which are copied
into the memory that the graph reads. For this, micro-batches on CUDA are filled up to a few shapes, which has another
benefit: no record's gradient depends on the number of other records.

Two kinds of passes run without graphs: those that cannot be recorded, for example because they make the host wait for
the GPU, and those with dropout, whose random numbers must repeat with the round's.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedlora.records import Batch
from fedlora.training.gradient_buffer import GradientBuffer

log = logging.getLogger(__name__)

Compute = Callable[[Batch, torch.Tensor | None], torch.Tensor]
"""A function (batch, weights) → [records] losses that also runs the backward pass of their (weighted) sum."""

Replay = Callable[[], object]
"""A function that repeats the recorded pass on the present contents of the memory that the recording read."""


@dataclass(frozen=True)
class _Graph:
    """One recorded pass, with the memory that it reads and writes.

    Attributes:
        batch: The batch that the pass reads.
        weights: The losses' weights that the pass reads, if any.
        rows: The rows of the gradient buffer that the pass writes; None if autograd sums the gradients in the
            parameters.
        written: The ids of the parameters whose gradients are in `rows`.
        losses: [records] The losses that the pass writes.
        replay: Repeats the pass.
    """

    batch: Batch
    weights: torch.Tensor | None
    rows: torch.Tensor | None
    written: frozenset[int]
    losses: torch.Tensor
    replay: Replay


class GraphedPass:
    """Passes of one model over batches from the processor's memory, recorded once for each shape.

    Args:
        device: The device to compute on.
        record: Records a repeatable computation; returns its replay and its result. None records CUDA graphs.
    """

    def __init__(self, device: torch.device,
                 record: Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]] | None = None) -> None:
        self._device = device
        self._record = record or _CudaRecorder(device)
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._gradients: dict[int, torch.Tensor] = {}

    def __call__(self, compute: Compute, batch: Batch, weights: torch.Tensor | None,
                 buffer: GradientBuffer) -> torch.Tensor:
        """Compute a batch, by replaying the graph of its shape. A new shape is recorded first.

        The gradients end up in the buffer if it is armed, else in the parameters.

        Args:
            compute: The computation. It must be of the same model in every call, and is given its batch on the device.
            batch: The batch, in the processor's memory.
            weights: [records] The losses' weights in the sum; None for 1.
            buffer: The gradient buffer.

        Returns:
            [records] losses. The next call overwrites them.

        Raises:
            RuntimeError: The pass cannot be recorded, or fails.
        """
        if not buffer.armed:
            self._accumulate_in_place(buffer)
        shape = (*batch.input_ids.shape, batch.token_type_ids is None, weights is None, id(buffer), buffer.armed)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._recorded(compute, batch, weights, buffer)
        read = graph.batch.tensors()
        for name, given in batch.tensors().items():
            read[name].copy_(without_waiting(given, self._device), non_blocking=True)
        if weights is not None and graph.weights is not None:
            graph.weights.copy_(without_waiting(weights, self._device), non_blocking=True)
        graph.replay()
        if graph.rows is not None:
            buffer.show(graph.rows, graph.written)
        return graph.losses

    def _recorded(self, compute: Compute, batch: Batch, weights: torch.Tensor | None,
                  buffer: GradientBuffer) -> _Graph:
        read = batch.to(self._device)
        weights = None if weights is None else weights.to(self._device)
        armed = buffer.armed

        def again() -> torch.Tensor:
            if armed:
                buffer.arm(len(read.input_ids))
            return compute(read, weights)

        before = [gradient.clone() for gradient in self._gradients.values()]
        try:
            replay, losses = self._record(again)
        finally:
            for gradient, kept in zip(self._gradients.values(), before, strict=True):
                gradient.copy_(kept)
        return _Graph(read, weights, buffer.rows if armed else None, buffer.written, losses, replay)

    def _accumulate_in_place(self, buffer: GradientBuffer) -> None:
        """Make each parameter's `grad` the same tensor in every pass: a graph adds to the memory that it recorded."""
        for slot in buffer.slots:
            parameter = slot.parameter
            if id(parameter) not in self._gradients:
                self._gradients[id(parameter)] = torch.zeros_like(parameter)
            if parameter.grad is None:
                parameter.grad = self._gradients[id(parameter)].zero_()
            assert parameter.grad is self._gradients[id(parameter)], "another gradient would be stepped with"


def without_waiting(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the values on the device. The host does not wait for a copy to CUDA; the GPU does it in order."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class _CudaRecorder:
    """A recorder of one model's CUDA graphs. They are replayed one at a time, so that all share the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(here):  # restores the current stream, also after an error
            try:
                with torch.cuda.stream(self._stream):
                    compute()  # a first pass sets things up that must not be recorded
                    with _no_waiting():
                        expected = compute()
                # thread_local: other threads may allocate memory meanwhile, as the one that draws noise does
                with _no_collection(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                                        capture_error_mode="thread_local"):
                    losses = compute()
            finally:  # after a failure, work that was begun must not overlap with a pass without graphs
                here.wait_stream(self._stream)
            graph.replay()
        if not torch.allclose(losses, expected, rtol=0.01, atol=1e-3, equal_nan=True):
            raise RuntimeError("a replay gives other losses than the pass that was recorded")
        return graph.replay, losses


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch garbage collection off, so that no graph of a discarded model is freed in the middle of a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the GPU.

    Within a recording, such a wait would be an error that does more damage. The setting holds for all threads, so no
    other thread may wait for the GPU meanwhile, except the threads of this one's backward pass.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
