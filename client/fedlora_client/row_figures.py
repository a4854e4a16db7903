"""Figures about a data holder's rows, for `fedlora-client check`: duplicates, units of privacy, labels, lengths."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass

import numpy as np

from fedlora.data import Overview, Rows, labelled_by
from fedlora.data.problems import FIRST
from fedlora.privacy.ledger.fingerprints import fingerprints


@dataclass(frozen=True)
class Duplicates:
    """Rows whose texts occurred before, apart from capitals and blanks.

    Attributes:
        count: number of these rows.
        otherwise: number of those with another answer than the first such row.
        first: the first places, each with the place of the first such row, as "file:line = file:line".
    """

    count: int
    otherwise: int
    first: tuple[str, ...]


def duplicates(rows: Rows) -> dict[bool, Duplicates]:
    """Find rows that the ledger's fingerprints cannot tell apart.

    Returns:
        False → those whose first row is in the same file; True → those whose first row is in another file.
    """
    first: dict[bytes, int] = {}
    again: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for row, digest in enumerate(fingerprints(rows, secrets.token_bytes(32), None)):
        if (other := first.setdefault(digest, row)) != row:
            again[bool(rows.file_of[row] != rows.file_of[other])].append((row, other))
    answers = rows.answers or (None,) * len(rows)
    return {across: Duplicates(len(pairs), sum(answers[row] != answers[other] for row, other in pairs),
                               tuple(f"{rows.where(row)} = {rows.where(other)}" for row, other in pairs[:FIRST]))
            for across, pairs in again.items()}


@dataclass(frozen=True)
class Units:
    """The numbers of rows of the units of privacy.

    Attributes:
        count: number of units.
        least: fewest rows of a unit.
        median: median number of rows.
        most: most rows of a unit.
        beyond: number of units with more rows than enter a step.
    """

    count: int
    least: int
    median: float
    most: int
    beyond: int


def units(rows: Rows, rows_per_unit: int) -> Units | None:
    """Return figures about the rows of each unit; None if each row is a unit of its own.

    Args:
        rows: the rows.
        rows_per_unit: the most rows of a unit that enter a step.
    """
    if rows.units is None:
        return None
    sizes = np.array(list(Counter(rows.units).values()))
    return Units(len(sizes), int(sizes.min()), float(np.median(sizes)), int(sizes.max()),
                 int((sizes > rows_per_unit).sum()))


@dataclass(frozen=True)
class Label:
    """A label and the ways in which the files write it.

    Attributes:
        name: the label as the run knows it.
        count: number of rows that have it.
        declared: whether its owner has declared it.
        spellings: other spelling → number of rows, for those that differ in capitals, in blanks or by --label-map.
    """

    name: str
    count: int
    declared: bool
    spellings: dict[str, int]


def labels(rows: Rows, overview: Overview, declared: tuple[str, ...] | None) -> list[Label]:
    """Return the labels, the most frequent one first; declared ones that no row has are among them.

    Args:
        rows: the rows.
        overview: the facts about their files.
        declared: the declared label set; None if there is none.
    """
    found = Counter(label for label in labelled_by(rows, declared or ()).labels or () if label is not None)
    spellings: dict[str, dict[str, int]] = {}
    for (name, text), count in overview.spelled.most_common():
        spellings.setdefault(name, {})[text] = count
    names = sorted({*found, *(declared or ())}, key=lambda name: (-found[name], name))
    return [Label(name, found[name], name in (declared or ()), spellings.get(name, {})) for name in names]


@dataclass(frozen=True)
class Lengths:
    """The lengths of the records in tokens, before anything is cut.

    Attributes:
        least: tokens of the shortest record.
        median: median number of tokens.
        nearly_all: the number of tokens that 95 % of the records do not exceed.
        most: tokens of the longest record.
        cut: number of records that are longer than the run keeps.
        share: share of all tokens that are cut off.
    """

    least: int
    median: int
    nearly_all: int
    most: int
    cut: int
    share: float


def lengths(tokens: np.ndarray, max_length: int) -> Lengths:
    """Return figures about the records' lengths.

    Args:
        tokens: [records] number of tokens of each, at least one record.
        max_length: number of tokens that the run keeps.
    """
    beyond = np.maximum(tokens - max_length, 0)
    median, nearly_all = np.percentile(tokens, [50, 95], method="higher")
    return Lengths(int(tokens.min()), int(median), int(nearly_all), int(tokens.max()), int((beyond > 0).sum()),
                   float(beyond.sum() / tokens.sum()))
