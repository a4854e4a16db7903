"""Poisson sampling of the records of a step, and their split into padded micro-batches.

Each unit of privacy enters a step with probability q, independently of all others; the comparison is in float64. A unit
is a record, or all records of one patient, for example. At most `rows_per_unit` records of a unit are taken, chosen at
random. The length that a record is padded to depends on its own length alone, so that no other record can change its
gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.privacy.rng import RandomStream

LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Padded lengths in tokens, for training without privacy on other devices than CUDA.

A record is padded to the next of them; beyond the last, to a multiple of it."""

PRIVATE_LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Padded lengths for private training on other devices than CUDA.

Private micro-batches of each length are filled up with filler rows; with fewer lengths, fewer fillers are needed."""

GRAPH_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
"""Padded lengths on CUDA, with and without privacy.

A CUDA graph is recorded for each length, and more padding costs less there than one more micro-batch."""


@dataclass(frozen=True)
class Draw:
    """The records drawn for one step.

    Attributes:
        indices: [rows] The drawn records. Records of one unit are neighbours.
        owners: [rows] For each record, the number of its unit among the drawn ones: ascending, from 0 to the number of
            drawn units - 1. None if each record is a unit of its own.
    """

    indices: np.ndarray
    owners: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of units drawn."""
        return len(self.indices) if self.owners is None else int(self.owners.max(initial=-1)) + 1

    @property
    def weights(self) -> np.ndarray:
        """[rows] float64: for each record, one over the number of drawn records of its unit."""
        if self.owners is None:
            return np.ones(len(self.indices))
        weights: np.ndarray = 1.0 / np.bincount(self.owners)[self.owners]
        return weights

    def groups(self, most: int) -> Iterator[Draw]:
        """Split the draw into draws of at most `most` units each, as evenly as possible.

        A draw in which each record is a unit of its own stays whole.
        """
        if self.owners is None:
            yield self
            return
        cuts = np.linspace(0, len(self), -(-len(self) // most) + 1).astype(np.int64)
        for first, last in itertools.pairwise(cuts):
            inside = (self.owners >= first) & (self.owners < last)
            yield Draw(self.indices[inside], self.owners[inside] - first)


class Sampler:
    """A Poisson sampler over the units of n records.

    Each step takes the same amount of random numbers from the stream, whatever is drawn: one for each unit, which
    decides whether the unit enters, and where units have several records, `rows_per_unit` more for each unit, which
    choose among its records. So the data of one unit never changes what is drawn of another.

    Args:
        records: n, the number of records.
        units: [n] The unit of each record, numbered from 0 without gaps. None if each record is a unit of its own.
        sampling_rate: q, the probability with which a unit enters a step.
        rows_per_unit: k, the most records of one unit in a step.
        stream: The source of random numbers.

    Raises:
        ValueError: `rows_per_unit` is below 1.
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
        """Draw the next step. It may be empty."""
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
    """Draw each of range(count) with the given probability.

    Args:
        count: The number of units.
        sampling_rate: The probability of each.
        stream: The source of random numbers; `count` of them are taken.

    Returns:
        The drawn numbers, int64, ascending. There may be none.
    """
    return np.flatnonzero(stream.uniform(count) < sampling_rate)


def subsets(sizes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Choose k different numbers below each size, every subset with equal probability (Floyd's algorithm).

    Args:
        sizes: [units] The size of each unit. The rows of units smaller than k have no meaning.
        uniform: [units, k] Uniform random numbers in [0, 1).

    Returns:
        [units, k] int64. The order within a row is random, but not all orders are equally likely.
    """
    units, k = uniform.shape
    chosen = np.full((units, k), -1)
    for j in range(k):
        last = sizes - k + j
        place = np.floor(uniform[:, j] * (last + 1)).astype(np.int64)
        chosen[:, j] = np.where((chosen == place[:, None]).any(axis=1), last, place)
    return chosen


def padded_lengths(lengths: np.ndarray, max_length: int, ladder: Sequence[int] = LENGTHS) -> np.ndarray:
    """Return each record's padded length. It depends on nothing but the record's own length and public constants.

    Args:
        lengths: [n] The number of tokens of each record, none above `max_length`.
        max_length: The plan's limit on tokens.
        ladder: The padded lengths to choose from, ascending.
    """
    steps = np.array([*ladder, *range(2 * ladder[-1], max_length + ladder[-1], ladder[-1])])
    padded: np.ndarray = np.minimum(steps[np.searchsorted(steps, lengths)], max_length)
    return padded


def lengths_up_to(max_length: int, ladder: Sequence[int] = LENGTHS) -> list[int]:
    """Return every padded length that a record of at most `max_length` tokens can have, ascending."""
    found: list[int] = np.unique(padded_lengths(np.arange(1, max_length + 1), max_length, ladder)).tolist()
    return found


def records_at_once(length: int, most: int, tokens: int | None) -> int:
    """Return the most records of a micro-batch that is padded to this length; at least 1.

    Args:
        length: The padded length.
        most: The limit on records.
        tokens: The limit on padded tokens (records · length). None for no limit.
    """
    return most if tokens is None else max(1, min(most, tokens // length))


def micro_batches(lengths: np.ndarray, indices: np.ndarray, max_length: int, at_once: Callable[[int], int],
                  ladder: Sequence[int] = LENGTHS) -> Iterator[tuple[int, np.ndarray]]:
    """Split drawn records into micro-batches of one padded length each, as evenly as possible.

    Args:
        lengths: [n] The number of tokens of every record, none above `max_length`.
        indices: The drawn records.
        max_length: The plan's limit on tokens.
        at_once: Padded length → the most records of a micro-batch.
        ladder: The padded lengths to choose from, ascending.

    Yields:
        (padded length, indices of the micro-batch's records)
    """
    padded = padded_lengths(lengths[indices], max_length, ladder)
    for length in np.unique(padded):
        bucket = indices[padded == length]
        for part in np.array_split(bucket, -(-len(bucket) // at_once(int(length)))):
            yield int(length), part
