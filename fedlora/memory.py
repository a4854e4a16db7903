"""Out-of-memory errors that say what to do about them."""

from __future__ import annotations

import contextlib
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
