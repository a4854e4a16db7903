"""Collection of the faults in data files by kind, so that their owner learns of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST = 3
"""Number of places that are named for each kind of fault."""

_MOST_KINDS = 12


class DataFaults(ValueError):
    """The faults of data files.

    Attributes:
        kinds: number of kinds of faults.
    """

    def __init__(self, message: str, kinds: int) -> None:
        super().__init__(message)
        self.kinds = kinds


@dataclass
class _Kind:
    first: list[str] = field(default_factory=list)
    count: int = 0


class Problems:
    """The faults of data files, and remarks on what may be a mistake, each by kind in the order of first occurrence.

    They never contain the content of a row.
    """

    def __init__(self) -> None:
        self._faults: dict[tuple[str, str], _Kind] = {}
        self._remarks: dict[tuple[str, str], _Kind] = {}

    def __len__(self) -> int:
        return sum(kind.count for kind in self._faults.values())

    def add(self, where: str, what: str, remedy: str) -> None:
        """Note a fault.

        Args:
            where: file and line, or only the file.
            what: what is wrong, in the same words for all faults of the same kind.
            remedy: how to correct it, as a sentence without its full stop.
        """
        _note(self._faults, where, what, remedy)

    def remark(self, where: str, what: str, remedy: str) -> None:
        """Note something that may be intended or a mistake. The arguments are those of `add`."""
        _note(self._remarks, where, what, remedy)

    def remarks(self) -> list[str]:
        """Return the remarks, one line for each kind."""
        return _lines(self._remarks)

    def raise_any(self) -> None:
        """Raise an error with all faults noted so far, if there are any.

        Raises:
            DataFaults: there are faults. For each kind the message gives the number and the first places.
        """
        lines, kinds = _lines(self._faults), len(self._faults)
        if len(lines) > 1:
            rest = [f"and {len(lines) - _MOST_KINDS} more kinds"] if len(lines) > _MOST_KINDS else []
            lines = [f"{len(self):,} faults of {len(lines)} kinds; nothing else is done until they are corrected:",
                     *(f"  {line}" for line in lines[:_MOST_KINDS] + rest)]
        if lines:
            raise DataFaults("\n".join(lines), kinds)


def places(first: Sequence[str], count: int) -> str:
    """Return a message's list of places, of which the first few are named and the rest counted.

    Args:
        first: the first places.
        count: the number of all places.
    """
    return ", ".join(first[:FIRST]) + (f" and {count - FIRST:,} more" if count > FIRST else "")


def _note(kinds: dict[tuple[str, str], _Kind], where: str, what: str, remedy: str) -> None:
    kind = kinds.setdefault((what, remedy), _Kind())
    kind.count += 1
    if kind.count <= FIRST:
        kind.first.append(where)


def _lines(kinds: dict[tuple[str, str], _Kind]) -> list[str]:
    return [f"{places(kind.first, kind.count)}: {what}. {remedy}" for (what, remedy), kind in kinds.items()]
