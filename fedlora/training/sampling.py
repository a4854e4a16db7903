"""Which records enter a step, and how the drawn ones are laid out in memory.

Sampling is Poisson: each unit of privacy enters with probability q on its own, in float64, whatever the others do. A
unit is a record, or all records of a patient, say; of those, at most `rows_per_unit` are taken, at random. A record is
padded to a length that depends on its own length alone, so that no other record can change its gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.privacy.rng import RandomStream

LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The lengths to which records are padded; beyond the last, multiples of it."""

PRIVATE_LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""The same with privacy, where micro-batches of each length are filled up: fewer lengths need less filling."""

GRAPH_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
"""The same on CUDA, with privacy or without: a graph is recorded for each, and padding costs less than a micro-batch
more."""


@dataclass(frozen=True)
class Draw:
    """What enters one step.

    Attributes:
        indices: [rows] the records; those of one unit are neighbours.
        owners: [rows] ascending, from 0 to the number of drawn units - 1: which of them each record belongs to; None
            if each record is a unit of its own.
    """

    indices: np.ndarray
    owners: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of units drawn."""
        return len(self.indices) if self.owners is None else int(self.owners.max(initial=-1)) + 1

    @property
    def weights(self) -> np.ndarray:
        """[rows] float64: one over the number of drawn records of the record's unit."""
        if self.owners is None:
            return np.ones(len(self.indices))
        return 1.0 / np.bincount(self.owners)[self.owners]

    def groups(self, most: int) -> Iterator[Draw]:
        """Split into draws of at most `most` units, as even as can be; a draw of single records stays whole."""
        if self.owners is None:
            yield self
            return
        cuts = np.linspace(0, len(self), -(-len(self) // most) + 1).astype(np.int64)
        for first, last in itertools.pairwise(cuts):
            inside = (self.owners >= first) & (self.owners < last)
            yield Draw(self.indices[inside], self.owners[inside] - first)


class Sampler:
    """Draws steps from n records, by unit.

    Each step takes the same amount of random numbers from the stream, whatever is drawn: one for each unit, which
    decides whether it enters, and `rows_per_unit` for each unit, which choose among its own records. So a unit's fate
    and choice never depend on another unit's data.

    Args:
        records: n.
        units: [n] the unit of each record, from 0, none without records; None: each record is a unit of its own.
        sampling_rate: q.
        rows_per_unit: k, the most records of one unit in a step.
    """

    def __init__(self, records: int, units: np.ndarray | None, sampling_rate: float, rows_per_unit: int,
                 stream: RandomStream) -> None:
        if units is not None and rows_per_unit < 1:
            raise ValueError(f"--rows-per-unit is {rows_per_unit}; it must be at least 1")
        self.records, self.units = records, units
        self.sampling_rate, self.rows_per_unit, self.stream = sampling_rate, rows_per_unit, stream
        if units is not None:
            self._order = np.argsort(units, kind="stable")
            self._sizes = np.bincount(units)
            self._starts = np.cumsum(self._sizes) - self._sizes

    def draw(self) -> Draw:
        """The next step's; may be empty."""
        if self.units is None:
            return Draw(poisson(self.records, self.sampling_rate, self.stream))
        k = self.rows_per_unit
        drawn = poisson(len(self._sizes), self.sampling_rate, self.stream)
        uniform = self.stream.uniform(len(self._sizes) * k).reshape(-1, k)[drawn]
        sizes = self._sizes[drawn]
        places = np.where(sizes[:, None] > k, subsets(sizes, uniform), np.arange(k))
        taken = np.arange(k) < sizes[:, None]
        return Draw(self._order[(self._starts[drawn][:, None] + places)[taken]],
                    np.repeat(np.arange(len(drawn)), np.minimum(sizes, k)))


def poisson(count: int, sampling_rate: float, stream: RandomStream) -> np.ndarray:
    """Those of range(count), ascending, that are drawn for one step; may be none."""
    return np.flatnonzero(stream.uniform(count) < sampling_rate)


def subsets(sizes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """A subset of k of range(size) for each size, all equally likely, by Floyd's algorithm.

    Args:
        sizes: [units]; the rows of those below k have no meaning.
        uniform: [units, k] in [0, 1).

    Returns:
        [units, k] int64, in random order but not in an unbiased one.
    """
    units, k = uniform.shape
    chosen = np.full((units, k), -1)
    for j in range(k):
        last = sizes - k + j
        place = np.floor(uniform[:, j] * (last + 1)).astype(np.int64)
        chosen[:, j] = np.where((chosen == place[:, None]).any(axis=1), last, place)
    return chosen


def padded_lengths(lengths: np.ndarray, max_length: int, ladder: Sequence[int] = LENGTHS) -> np.ndarray:
    """The padded length of each record: a function of its own length and the plan's constant `max_length`."""
    steps = np.array([*ladder, *range(2 * ladder[-1], max_length + ladder[-1], ladder[-1])])
    return np.minimum(steps[np.searchsorted(steps, lengths)], max_length)


def lengths_up_to(max_length: int, ladder: Sequence[int] = LENGTHS) -> list[int]:
    """Every padded length that a record of at most so many tokens can have, ascending."""
    return np.unique(padded_lengths(np.arange(1, max_length + 1), max_length, ladder)).tolist()


def records_at_once(length: int, most: int, tokens: int | None) -> int:
    """Most records of a micro-batch that is padded to this length.

    Args:
        most: most records.
        tokens: most padded tokens, if that leaves at least one record; None for any number.
    """
    return most if tokens is None else max(1, min(most, tokens // length))


def micro_batches(lengths: np.ndarray, indices: np.ndarray, max_length: int, at_once: Callable[[int], int],
                  ladder: Sequence[int] = LENGTHS) -> Iterator[tuple[int, np.ndarray]]:
    """Split drawn records into parts of one padded length each, as even as can be.

    Args:
        lengths: [n] number of tokens of every record, none above max_length.
        indices: of the drawn records.
        at_once: padded length → most records in a part.
        ladder: the lengths to which records are padded.

    Yields:
        (padded length, indices of the part)
    """
    padded = padded_lengths(lengths[indices], max_length, ladder)
    for length in np.unique(padded):
        bucket = indices[padded == length]
        for part in np.array_split(bucket, -(-len(bucket) // at_once(int(length)))):
            yield int(length), part
