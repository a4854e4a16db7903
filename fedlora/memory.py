"""Out of memory, said for people."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def memory_advice(doing: str, remedy: str) -> Iterator[None]:
    """Raises MemoryError with the remedy in place of what PyTorch or Python raise when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(f"{doing} ran out of memory: {remedy}") from None
        raise
