"""Out-of-memory errors that say what to do about them, and the memory that was needed."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def memory_advice(doing: str, remedy: str) -> Iterator[None]:
    """Turn the out-of-memory errors of PyTorch and Python into one MemoryError that names a remedy.

    Args:
        doing: what runs in the `with` block, as the subject of the message: "evaluation".
        remedy: what the user can do about it.

    Raises:
        MemoryError: memory ran out in the `with` block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(f"{doing} ran out of memory: {remedy}") from None
        raise


def most_used(device: torch.device) -> int:
    """Return the most memory that this process has used so far, in bytes: a GPU's own on CUDA, else the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
