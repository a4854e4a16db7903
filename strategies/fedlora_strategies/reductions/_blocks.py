"""The uploads' values side by side, one block at a time, so that beside the uploads themselves little is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedlora.plan import Tensors

BLOCK = 1 << 14
"""Values of one tensor that are in a block; with 20 uploads a block has 2.5 MiB."""


def blocks(uploads: Sequence[Tensors]) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Yield all values of the uploads, in blocks.

    Yields:
        A tensor's name, the range of the flattened tensor that the block covers, and the values of all uploads in that
        range: float64, [uploads, values].
    """
    for name in uploads[0]:
        flat = [upload[name].reshape(-1) for upload in uploads]
        for start in range(0, flat[0].size, BLOCK):
            part = slice(start, start + BLOCK)
            yield name, part, np.stack([values[part] for values in flat], dtype=np.float64)


def by_value(uploads: Sequence[Tensors], combine: Callable[[np.ndarray], np.ndarray]) -> Tensors:
    """Combine the uploads value by value.

    Args:
        uploads: The uploads.
        combine: Maps a block, [uploads, values], to [values].

    Returns:
        The combined tensors, float32.
    """
    combined = {name: np.empty(array.size, np.float32) for name, array in uploads[0].items()}
    for name, part, values in blocks(uploads):
        combined[name][part] = combine(values)
    return {name: array.reshape(uploads[0][name].shape) for name, array in combined.items()}
