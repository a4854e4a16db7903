"""The model's blocks by `torch.compile`, on CUDA: fewer kernels, where `fedlora.training.graphs` launches them sooner.

Normalisations, activations, rotations and casts take a GPU about as long as a model's products in bf16; compiled, they
are done in a few passes over memory. Each padded length is compiled for itself, when its first micro-batch comes: what
a record's gradient is rounded to does not depend on what was trained before. The trained layers are left out, as their
backward pass writes to the gradient buffer; so are evaluation and rehearsal, whose shapes are many, and passes with
dropout, whose random numbers are to repeat with the round's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_MOST_VERSIONS = 256
"""Of one kind of block in one process: with each padded length, with and without privacy, of every model trained there.
Beyond PyTorch's limit, which is eight, it would silently go on without compiling."""


class CompiledBlocks:
    """A model whose repeated blocks can be compiled ones for a while; what is trained, and the parameters, stay.

    Args:
        trained: the layers to leave out.
        backend: of `torch.compile`.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Module], backend: str = "inductor") -> None:
        blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
        self._forwards = [*((leaf, torch.compiler.disable(leaf.forward)) for leaf in trained),
                          *((block, torch.compile(block.forward, dynamic=False, backend=backend)) for block in blocks)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """In it, the blocks are compiled ones."""
        try:
            with torch._dynamo.config.patch(recompile_limit=_MOST_VERSIONS):
                for module, forward in self._forwards:
                    module.forward = forward  # type: ignore[method-assign]
                yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def check_compiles(device: torch.device) -> None:
    """Compile something small, before anything depends on it.

    Raises:
        ValueError: this device or machine does not.
    """
    if device.type != "cuda":
        raise ValueError(f"--compile with --device {device.type}: micro-batches have few shapes, each of which is "
                         "compiled, on cuda alone; leave --compile out")
    try:
        torch.compile(lambda values: values.exp() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        raise ValueError(f"--compile: torch.compile does not work here ({type(error).__name__}: "
                         f"{str(error).partition(chr(10))[0][:200]}); it needs Triton and a C compiler. Leave "
                         "--compile out") from error
