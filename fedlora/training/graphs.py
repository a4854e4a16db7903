"""The forward and backward pass of a micro-batch as a CUDA graph: launched as a whole, not kernel by kernel.

A GPU runs the thousands of kernels of a pass faster than Python can launch them: those for 32 records of 64 tokens and
a Llama of 1 B in bf16 keep an H100 busy for 31 ms, and the processor beside it for 96. A graph is recorded once for
each shape [records, length] and then replayed on other records, which are copied into the memory that it reads. Hence
micro-batches on CUDA are filled up to a few shapes, which has another merit: no record's gradient depends on how many
others there are.

A pass that makes the host wait for the GPU, or does anything else that cannot be recorded, goes on without graphs; so
does one with dropout, whose random numbers are to repeat with the round's.
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
"""(batch, weights) → [records] losses. Runs the backward pass of their sum, weighted if there are weights."""

Replay = Callable[[], object]
"""Does again what was recorded, on what is now in the memory that it was recorded with."""


@dataclass(frozen=True)
class _Graph:
    """One recorded pass: what it reads (batch, weights) and writes (rows of `written` tensors, losses)."""

    batch: Batch
    weights: torch.Tensor | None
    rows: torch.Tensor | None
    written: frozenset[int]
    losses: torch.Tensor
    replay: Replay


class GraphedPass:
    """Passes over batches in the processor's memory, recorded for each of their shapes.

    Args:
        record: how: given a computation that may be repeated, returns its replay and its result.
    """

    def __init__(self, device: torch.device,
                 record: Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]] | None = None) -> None:
        self._device = device
        self._record = record or _CudaRecorder(device)
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._gradients: dict[int, torch.Tensor] = {}

    def __call__(self, compute: Compute, batch: Batch, weights: torch.Tensor | None,
                 buffer: GradientBuffer) -> torch.Tensor:
        """[records] losses, to be used before the next call; the gradients are in the buffer, if it is armed, or in
        the parameters.

        Args:
            compute: what is recorded; always of one model, and given its batch on the device.

        Raises:
            RuntimeError: the pass cannot be recorded, or fails.
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
        """Autograd adds to the memory that was recorded: the parameters' gradients are always the same tensors."""
        for slot in buffer.slots:
            parameter = slot.parameter
            if id(parameter) not in self._gradients:
                self._gradients[id(parameter)] = torch.zeros_like(parameter)
            if parameter.grad is None:
                parameter.grad = self._gradients[id(parameter)].zero_()
            assert parameter.grad is self._gradients[id(parameter)], "another gradient would be stepped with"


def without_waiting(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; a copy to CUDA is done when its turn comes, and not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class _CudaRecorder:
    """Graphs of one model: they are replayed one at a time, so that all may use the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(here):  # whatever happens, this is the current one afterwards
            try:
                with torch.cuda.stream(self._stream):
                    compute()  # what is set up by a first pass must not be recorded
                    with _no_waiting():
                        expected = compute()
                # thread_local: another thread may meanwhile ask for memory, as that which draws noise does
                with _no_collection(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                                        capture_error_mode="thread_local"):
                    losses = compute()
            finally:  # what it has begun must not go on beside a pass without graphs
                here.wait_stream(self._stream)
            graph.replay()
        if not torch.allclose(losses, expected, rtol=0.01, atol=1e-3, equal_nan=True):
            raise RuntimeError("a replay gives other losses than the pass that was recorded")
        return graph.replay, losses


@contextmanager
def _no_collection() -> Iterator[None]:
    """Graphs of another model that is not used any more must not be freed in the midst of a recording."""
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
    """RuntimeError where the host would wait for the GPU; in a recording it would be an error that damages more. All
    threads are held to it: none but this one's backward pass may wait meanwhile.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
