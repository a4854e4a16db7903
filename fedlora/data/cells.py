"""Checks of single cells of a data file: texts, answers, ids of units, and conversations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedlora.data.columns import Answer
from fedlora.data.encoding import LONGEST
from fedlora.data.parquet import NumberedClass
from fedlora.data.problems import Problems
from fedlora.data.rows import Message, is_missing, normalize_label, normalize_unit, place, shown, spelling


class Fault(NamedTuple):
    """A fault of a cell.

    Attributes:
        what: what is wrong.
        remedy: how to correct it.
        lacks: what the row lacks, "text" or "answer", if it is just incomplete.
    """

    what: str
    remedy: str
    lacks: str = ""


_REMEMBERED = 100_000
"""Most values of a column that are remembered, so that equal values need not be checked again."""

_FILL = "Fill it, or remove the row"

COMPLETE = "Fill it, remove the row, or add --skip-incomplete to leave out such rows"


def text_fault(column: str, value: Any, lacks: str = "text") -> Fault | None:
    """Return what is wrong with a text; None if it is a string that can be used.

    Args:
        column: the column's name.
        value: the cell.
        lacks: what a row lacks whose cell is empty, "text" or "answer".
    """
    if isinstance(value, str) and not value.isspace() and value and len(value) <= LONGEST and _is_whole(value):
        return None
    name = shown(column)
    if value is None or value != value:
        return Fault(f"{name} is missing or empty", COMPLETE, lacks)
    if not isinstance(value, str):
        return Fault(f"{name} is of type {type(value).__name__}", "It must be a string")
    if not value.strip():
        return Fault(f"{name} is empty", COMPLETE, lacks)
    if len(value) > LONGEST:
        return Fault(f"{name} is longer than {LONGEST // 2**20} MiB", "Shorten it; no model reads that much")
    return _half(name)


def _is_whole(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _half(what: str) -> Fault:
    return Fault(f"{what} holds half of a Unicode surrogate pair (an escape like \\ud83d alone)",
                 "Write the whole character")


class _Reading(NamedTuple):
    answer: Any
    otherwise: str | None = None
    blanks: bool = False
    mapped: str | None = None


class AnswerCells:
    """A reader of answer cells that parses each different value once.

    Args:
        answer: the column of answers.
        problems: takes the faults and remarks.
        label_map: normalised label of the files → the run's name for it.

    Attributes:
        column: the task's name of the column.
        needed: whether rows without an answer are incomplete.
        words: word that stands for a missing value ("NA", say) → number of cells that held it.
        mapped: label of the files → number of cells in which `label_map` replaced it.
        spelled: (answer, text of the cell) → number of cells whose text is another spelling of the answer.
    """

    def __init__(self, answer: Answer, problems: Problems, label_map: Mapping[str, str] | None = None) -> None:
        self.column, self.needed = answer.column, answer.needed
        self._answer, self._problems, self._map = answer, problems, label_map or {}
        self._known: dict[tuple[type, Any], _Reading] = {}
        self.words: Counter[str] = Counter()
        self.mapped: Counter[str] = Counter()
        self.spelled: Counter[tuple[str, str]] = Counter()

    def read(self, file: str, line: int, value: Any) -> tuple[Any, str | None]:
        """Parse a cell, and note a fault if it holds no valid answer.

        Returns:
            The answer, or None if there is none; and its other reading (see `Rows.otherwise`), or None.
        """
        if value is None:
            return None, None
        key = (type(value), value)
        try:
            found = self._known.get(key)
        except TypeError:
            found = None  # a list or an object, which cannot be a key
        if found is None:
            found = self._parse(file, line, value)
            if found.answer is not None and len(self._known) < _REMEMBERED:
                self._known[key] = found
        if found.mapped is not None:
            self.mapped[found.mapped] += 1
        if found.blanks:
            self._problems.remark(place(file, line), f"the {self._answer.column} has blanks around it",
                                  "They are left out")
        if isinstance(found.answer, str) and isinstance(value, str) and value != found.answer:
            self.spelled[found.answer, value] += 1
        return found.answer, found.otherwise

    def _parse(self, file: str, line: int, value: Any) -> _Reading:
        name = self._answer.column
        blanks = isinstance(value, str) and value != value.strip()
        if (mapped := self._in_map(value)) is not None:
            return _Reading(self._map[mapped], blanks=blanks, mapped=mapped)
        if is_missing(value):
            word = spelling(value) if isinstance(value, str) else ""
            if word:
                self.words[word] += 1
            return _Reading(None, word or None)
        try:
            answer = self._answer.parse(value)
        except TypeError as error:
            self._problems.add(place(file, line), f"the {name} is {error}", self._answer.remedy)
            return _Reading(None)
        if isinstance(answer, str) and not _is_whole(answer):
            fault = _half(f"the {name}")
            self._problems.add(place(file, line), fault.what, fault.remedy)
        number = str(value.number) if isinstance(value, NumberedClass) else None
        return _Reading(answer, number, blanks=blanks and isinstance(answer, str))

    def _in_map(self, value: Any) -> str | None:
        if not self._map:
            return None
        try:
            name = normalize_label(value)
        except TypeError:
            return None
        return name if name in self._map else None


class UnitCells:
    """A reader of cells with the ids of privacy units. It checks each different value once."""

    def __init__(self, column: str, problems: Problems) -> None:
        self._column, self._problems = shown(column), problems
        self._known: dict[tuple[type, Any], str] = {}

    def read(self, file: str, line: int, value: Any) -> str:
        """Return a cell's normalised id. If the cell holds no valid id, note the fault and return ""."""
        try:
            found = self._known.get((type(value), value))
        except TypeError:
            found = None
        if found is None:
            found = self._normalize(file, line, value)
            if found and len(self._known) < _REMEMBERED:
                self._known[type(value), value] = found
        return found

    def _normalize(self, file: str, line: int, value: Any) -> str:
        try:
            name = normalize_unit(value)
        except TypeError as error:
            self._problems.add(place(file, line), f"the {self._column} is {error}",
                               "Write it as a whole number or a string")
            return ""
        if name is None:
            self._problems.add(place(file, line), f"{self._column} is missing or empty, so it is unknown whose row "
                               "this is", _FILL)
            return ""
        if not _is_whole(name):
            fault = _half(self._column)
            self._problems.add(place(file, line), fault.what, fault.remedy)
        return name


_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
            "ai": "assistant"}
_ROLES = ("system", "user", "assistant")

_EXAMPLE = '[{"role": "user", "content": …}, {"role": "assistant", "content": …}]'


def conversation(value: Any) -> tuple[tuple[Message, ...], Fault | None]:
    """Parse a conversation, given as a list of messages or as the JSON of one.

    Returns:
        The messages, and None; or (), and what is wrong.
    """
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return (), Fault("messages is missing or empty", COMPLETE, "text")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return (), Fault("messages is text, but not JSON (perhaps a list as Python prints it)",
                             f"Write it with json.dumps: {_EXAMPLE}")
    if not isinstance(value, list):
        return (), Fault("messages is not a list of messages", f"Write {_EXAMPLE}")
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            sharegpt = isinstance(turn, dict) and {"from", "value"} <= turn.keys()
            return (), Fault("a message has no role", "Give each a role and a content"
                             + (', in place of "from" and "value"' if sharegpt else ""))
        role, content = turn["role"], turn.get("content")
        if not _is_whole(role):
            return (), _half("role of a message")
        if fault := text_fault("content of a message", content):
            return (), fault
        plain = role.strip().casefold()
        if (meant := _ALIASES.get(plain, plain)) in _ROLES and meant != role:
            return (), Fault(f"a message has a role that means {meant}, but is spelled differently",
                             f'Write "role": "{meant}"')
        turns.append((role, str(content)))
    if all(role != "assistant" for role, _ in turns):
        return (), Fault("no message has the role assistant, so there is nothing to learn from",
                         "Add the answer, remove the row, or add --skip-incomplete to leave out such rows", "answer")
    return tuple(turns), None
