"""Compilation of the model's repeated blocks by `torch.compile`, on CUDA, so that a pass needs fewer kernels.

In bf16, normalisations, activations, rotary embeddings and casts take a GPU about as long as the matrix products do.
Compiled, they need only a few passes over memory. (`fedlora.training.graphs` is the complement: it launches the kernels
faster.)

Each padded length is compiled separately, when its first micro-batch arrives. So the rounding of a record's gradient
does not depend on what was trained before. These are not compiled:

- the trained layers, because their backward pass writes to the gradient buffer
- evaluation and rehearsal, because they have many shapes
- passes with dropout, because their random numbers must repeat with the round's
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_MOST_VERSIONS = 256
"""The most versions of one kind of block to compile in one process: one for each padded length, with and without
privacy, of every model trained there. PyTorch's own limit is eight; beyond it, it silently stops compiling."""


class CompiledBlocks:
    """A switch that replaces the forward passes of a model's repeated blocks by compiled ones for a while.

    The parameters and the trained layers stay as they are.

    Args:
        model: The model. Its repeated blocks are the entries of its longest `nn.ModuleList`.
        trained: The layers to leave uncompiled.
        backend: The backend of `torch.compile`.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Module], backend: str = "inductor") -> None:
        blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
        plain = torch.compiler.disable
        self._forwards = [*((leaf, plain(leaf.forward)) for leaf in trained),  # type: ignore[no-untyped-call]
                          *((block, torch.compile(block.forward, dynamic=False, backend=backend)) for block in blocks)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compile the blocks within a `with` statement."""
        try:
            with torch._dynamo.config.patch(recompile_limit=_MOST_VERSIONS):
                for module, forward in self._forwards:
                    module.forward = forward
                yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def check_compiles(device: torch.device) -> None:
    """Compile something small, to find out early whether this machine can.

    Raises:
        ValueError: The device is not CUDA, or `torch.compile` fails here.
    """
    if device.type != "cuda":
        raise ValueError(f"--compile with --device {device.type} is not supported: only on cuda have micro-batches so "
                         "few shapes that compiling each one pays. Leave --compile out, or use --device cuda")
    try:
        torch.compile(lambda values: values.exp() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        raise ValueError(f"--compile: torch.compile does not work here ({type(error).__name__}: "
                         f"{str(error).partition(chr(10))[0][:200]}); it needs Triton and a C compiler. Leave "
                         "--compile out") from error
