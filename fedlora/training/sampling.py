"""Which records enter a step, and how the drawn ones are laid out in memory.

Sampling is Poisson: each record enters with probability q on its own, in float64, whatever the others do. A record is
padded to a length that depends on its own length alone, so that no other record can change its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlora.privacy.streams import Stream

LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The lengths to which records are padded; beyond the last, multiples of it."""


def poisson(records: int, sampling_rate: float, stream: Stream) -> np.ndarray:
    """Indices, ascending, of the records drawn for one step; may be empty."""
    return np.flatnonzero(stream.uniform(records) < sampling_rate)


def padded_lengths(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """The padded length of each record: a function of its own length and the plan's constant `max_length`."""
    ladder = np.array([*LENGTHS, *range(2 * LENGTHS[-1], max_length + LENGTHS[-1], LENGTHS[-1])])
    return np.minimum(ladder[np.searchsorted(ladder, lengths)], max_length)


def micro_batches(lengths: np.ndarray, indices: np.ndarray, max_length: int, *, most: int,
                  tokens: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Split drawn records into parts of one padded length each, as even as can be.

    Args:
        lengths: [n] number of tokens of every record, none above max_length.
        indices: of the drawn records.
        most: most records in a part.
        tokens: most padded tokens in a part, if that leaves at least one record; None for any number.
    Yields:
        (padded length, indices of the part)
    """
    padded = padded_lengths(lengths[indices], max_length)
    for length in np.unique(padded):
        bucket = indices[padded == length]
        size = most if tokens is None else max(1, min(most, tokens // int(length)))
        for part in np.array_split(bucket, -(-len(bucket) // size)):
            yield int(length), part
