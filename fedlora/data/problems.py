"""What is wrong with files of rows, collected by kind: whoever has forty faults to mend hears of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST = 3
"""So many places of each kind are named."""

_MOST_KINDS = 12


@dataclass
class _Kind:
    first: list[str] = field(default_factory=list)
    count: int = 0


class Problems:
    """Faults, and what is remarkable but none, by kind in the order in which each was first met.

    No row's content is ever among them.
    """

    def __init__(self) -> None:
        self._faults: dict[tuple[str, str], _Kind] = {}
        self._remarks: dict[tuple[str, str], _Kind] = {}

    def __len__(self) -> int:
        return sum(kind.count for kind in self._faults.values())

    def add(self, where: str, what: str, remedy: str) -> None:
        """Note a fault.

        Args:
            where: file and line, or the file.
            what: is wrong there, in the same words for all faults of its kind.
            remedy: a sentence without its full stop.
        """
        _note(self._faults, where, what, remedy)

    def remark(self, where: str, what: str, remedy: str) -> None:
        """Note what may be meant so, and may not; as `add`."""
        _note(self._remarks, where, what, remedy)

    def remarks(self) -> list[str]:
        """A line for each kind."""
        return _lines(self._remarks)

    def raise_any(self) -> None:
        """Raises ValueError with all kinds of faults, of each the count and the first places, if there is any."""
        lines = _lines(self._faults)
        if len(lines) > 1:
            rest = [f"and {len(lines) - _MOST_KINDS} more kinds"] if len(lines) > _MOST_KINDS else []
            lines = [f"{len(self):,} faults of {len(lines)} kinds; nothing is done before they are mended:",
                     *(f"  {line}" for line in lines[:_MOST_KINDS] + rest)]
        if lines:
            raise ValueError("\n".join(lines))


def places(first: Sequence[str], count: int) -> str:
    """How a message names where `count` things are, of which the first few are given."""
    return ", ".join(first[:FIRST]) + (f" and {count - FIRST:,} more" if count > FIRST else "")


def _note(kinds: dict[tuple[str, str], _Kind], where: str, what: str, remedy: str) -> None:
    kind = kinds.setdefault((what, remedy), _Kind())
    kind.count += 1
    if kind.count <= FIRST:
        kind.first.append(where)


def _lines(kinds: dict[tuple[str, str], _Kind]) -> list[str]:
    return [f"{places(kind.first, kind.count)}: {what}. {remedy}" for (what, remedy), kind in kinds.items()]
