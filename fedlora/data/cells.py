"""Checks of single cells of a data file: texts, answers, ids of units, and conversations."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from fedlora.data.columns import Answer
from fedlora.data.lines import LONGEST
from fedlora.data.parquet import NumberedClass
from fedlora.data.problems import Problems
from fedlora.data.rows import Message, is_missing, normalize_unit, place, shown, spelling

Fault = tuple[str, str]
"""(what is wrong, how to correct it)."""

_REMEMBERED = 100_000
"""Most values of a column that are remembered, so that equal values need not be checked again."""

_FILL = "Fill it, or remove the row"


def text_fault(column: str, value: Any) -> Fault | None:
    """Return what is wrong with a text; None if it is a string that can be used."""
    if isinstance(value, str) and not value.isspace() and value and len(value) <= LONGEST and _is_whole(value):
        return None
    name = shown(column)
    if value is None or value != value:
        return f"{name} is missing or empty", _FILL
    if not isinstance(value, str):
        return f"{name} is of type {type(value).__name__}", "It must be a string"
    if not value.strip():
        return f"{name} is empty", _FILL
    if len(value) > LONGEST:
        return f"{name} is longer than {LONGEST // 2**20} MiB", "Shorten it; no model reads that much"
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
    return f"{what} holds half of a Unicode surrogate pair (an escape like \\ud83d alone)", "Write the whole character"


class AnswerCells:
    """A reader of answer cells that parses each different value once.

    Attributes:
        words: word that stands for a missing value ("NA", say) → number of cells that held it.
    """

    def __init__(self, answer: Answer, problems: Problems) -> None:
        self._answer, self._problems = answer, problems
        self._known: dict[tuple[type, Any], tuple[Any, str | None]] = {}
        self.words: Counter[str] = Counter()

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
            if found[0] is not None and len(self._known) < _REMEMBERED:
                self._known[key] = found
        return found

    def _parse(self, file: str, line: int, value: Any) -> tuple[Any, str | None]:
        name = self._answer.column
        if is_missing(value):
            word = spelling(value) if isinstance(value, str) else ""
            if word:
                self.words[word] += 1
            return None, word or None
        try:
            answer = self._answer.parse(value)
        except TypeError as error:
            self._problems.add(place(file, line), f"the {name} is {error}", self._answer.remedy)
            return None, None
        if isinstance(answer, str) and not _is_whole(answer):
            self._problems.add(place(file, line), *_half(f"the {name}"))
        return answer, str(value.number) if isinstance(value, NumberedClass) else None


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
            self._problems.add(place(file, line), *_half(self._column))
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
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return (), ("messages is text, but not JSON (perhaps a list as Python prints it)",
                        f"Write it with json.dumps: {_EXAMPLE}")
    if not isinstance(value, list) or not value:
        return (), ("messages is not a list of messages", f"Write {_EXAMPLE}")
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            sharegpt = isinstance(turn, dict) and {"from", "value"} <= turn.keys()
            return (), ("a message has no role", "Give each a role and a content"
                        + (', in place of "from" and "value"' if sharegpt else ""))
        role, content = turn["role"], turn.get("content")
        if not _is_whole(role):
            return (), _half("role of a message")
        if fault := text_fault("content of a message", content):
            return (), fault
        plain = role.strip().casefold()
        if (meant := _ALIASES.get(plain, plain)) in _ROLES and meant != role:
            return (), (f"a message has a role that means {meant}, but is spelled differently",
                        f'Write "role": "{meant}"')
        turns.append((role, str(content)))
    if all(role != "assistant" for role, _ in turns):
        return (), ("no message has the role assistant, so there is nothing to learn from",
                    "Add the answer, or remove the row")
    return tuple(turns), None
