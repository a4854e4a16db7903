"""Names of columns: which columns a task reads, which column a name means, and which names an error may show."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from fedlora.data.rows import is_table, shown, spelling

KindOfRows = tuple[str, tuple[str, ...]]
"""(one of `fedlora.data.rows.KINDS`, the names of the columns that hold it)."""


@dataclass(frozen=True)
class Answer:
    """The column that holds what a model learns to predict from a text.

    Attributes:
        column: the column's name, unless --column gives another.
        parse: turns a cell's value into the answer, or None if there is none. It raises TypeError for a value that
            cannot be an answer. The error's message describes the value ("a fraction") without quoting it. Words that
            stand for a missing value are handled before.
        remedy: how to write an answer, for the owner of a cell that does not parse.
        needed: whether files must have the column, and --skip-incomplete leaves out rows without an answer.
    """

    column: str
    parse: Callable[[object], Any]
    remedy: str
    needed: bool = True


@dataclass(frozen=True)
class RowFormat:
    """The columns that the data files of a task have.

    Attributes:
        kinds: the kinds of rows that the task reads, each with its columns. The first kind whose columns a file has is
            used.
        answer: the column of answers; None if the rows themselves hold what is learned.
        otherwise: ending of the error message about missing columns.
    """

    kinds: tuple[KindOfRows, ...]
    answer: Answer | None = None
    otherwise: str = ""


def column_names(form: RowFormat) -> set[str]:
    """Return the names of all columns that rows can have, except the column of the privacy unit."""
    return {name for _, columns in form.kinds for name in columns} | ({form.answer.column} if form.answer else set())


def unanswered(form: RowFormat) -> RowFormat:
    """Return the form without the need for a column of answers, for rows that are to be predicted."""
    return form if form.answer is None else replace(form, answer=replace(form.answer, needed=False))


def required(kind_of_rows: KindOfRows) -> tuple[str, ...]:
    """Return the columns that every row must have. The second column of a pair may be empty or absent."""
    kind, columns = kind_of_rows
    return columns[:1] if kind == "pair" else columns


def folded(name: str) -> str:
    """Return a column's name without differences in capitals, outer blanks and invisible characters."""
    return spelling(name).casefold()


def find_column(wanted: str, present: Collection[str]) -> str | None:
    """Return the column that a name means: the one of exactly this name, else the only one of the same `folded` name.

    Args:
        wanted: the name.
        present: names of the file's columns.

    Returns:
        The column's name in the file; None if there is no such column, or several.
    """
    if wanted in present:
        return wanted
    alike = [name for name in present if folded(name) == folded(wanted)]
    return alike[0] if len(alike) == 1 else None


class Needs:
    """The columns of a data file that a task and the options need.

    Args:
        form: the columns that the task reads.
        names: the task's name of a column → the file's name, for the columns that --column gives.
        unit: the file's name of the unit's column; None if each row is a unit.
    """

    def __init__(self, form: RowFormat, names: Mapping[str, str], unit: str | None) -> None:
        beside = [form.answer.column] if form.answer else []
        needed = beside if form.answer and form.answer.needed else []
        self._kinds = [[names.get(name, name) for name in (*required(one), *needed)] + ([unit] if unit else [])
                       for one in form.kinds if names.keys() - beside <= set(one[1])]
        every = [names.get(name, name) for name in column_names(form)] + ([unit] if unit else [])
        self._names = set(map(folded, every))

    def __call__(self, name: str) -> bool:
        """Return whether the column of this name is needed."""
        return folded(name) in self._names

    def fits(self, names: Collection[str]) -> bool:
        """Return whether columns of these names are all that a row must have."""
        return any(all(find_column(one, names) for one in kind) for kind in self._kinds)


class Everything(Needs):
    """The columns of a file of which all are read, to tell its owner about them."""

    def __init__(self) -> None:
        super().__init__(RowFormat(()), {}, None)

    @override
    def __call__(self, name: str) -> bool:
        return True


# --- What an error message shows ---

_LIKELY: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "texts", "note", "notes", "sentence", "content", "body", "document", "comment", "comments",
             "review", "message", "description", "abstract", "report", "utterance", "tweet", "post", "question",
             "title", "transcript", "narrative", "summary", "befund", "texte", "texto"),
    "label": ("label", "labels", "class", "klass", "klasse", "category", "target", "sentiment", "diagnosis", "triage",
              "outcome", "intent", "topic", "rating", "gold", "annotation", "etikett", "y"),
    "prompt": ("prompt", "instruction", "question", "query", "input", "request"),
    "completion": ("completion", "output", "response", "answer", "reply", "target"),
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns")}
"""A task's name for a column → names that files from elsewhere often use for it."""

_USUAL_WORDS = frozenset(name for names in _LIKELY.values() for name in names) | {
    "id", "idx", "index", "date", "patient", "pid", "name", "age", "sex", "split", "source"}

_SUGGESTED_LABELS = 20
_SHORT = 8
"""A column whose values have at most this many characters on average is not suggested as the column of texts."""


def show_columns(file: str, names: Sequence[str], usual: Collection[str], sample: Sequence[Mapping[str, Any]]) -> str:
    """Describe a file's columns for an error message.

    The names are not shown if they might be a row of private data, as in a file without a header line.

    Args:
        file: the file's name.
        names: names of the file's columns.
        usual: names of which any one shows that the first line is a header.
        sample: the file's first rows.
    """
    if not _may_show(file, names, usual, sample):
        count = "one column" if len(names) == 1 else f"{len(names)} columns"
        if is_table(file):
            return (f"it has {count}, whose names are not shown, since the first line may be a row; if the file has no "
                    "header line, add one")
        return f"it has {count}, whose names look like text and are not shown"
    return f"its columns are: {', '.join(map(shown, names))}"


def _may_show(file: str, names: Sequence[str], usual: Collection[str], sample: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the names are surely a header, and not a row of private data.

    Only tables and workbooks can lack a header. There, one usual name shows that the first line is a header. So does a
    column none of whose values could be a column's name, if no name occurs again as a value in its own column.
    """
    if any(len(name) > 40 or len(name.split()) > 4 or re.fullmatch(r"[-+\d.,:/ ]*", name) for name in names):
        return False
    if not is_table(file) or {folded(name) for name in usual} & {folded(n) for n in names}:
        return True
    if any(" " not in name and _words(name) & _USUAL_WORDS for name in names):
        return True
    values = _values(names, sample)
    again = any(folded(value) == folded(name) for name in names for value in values[name])
    unlike = any(each and all(map(_no_name, each)) for each in values.values())
    return not again and unlike and all(re.fullmatch(r"[^\W\d][\w.-]*", name) for name in names)


def _words(name: str) -> set[str]:
    return {word.casefold() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+", name)} | {folded(name)}


def _values(names: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {name: [str(row[name]) for row in sample if isinstance(row.get(name), (str, int, float))] for name in names}


def _no_name(value: str) -> bool:
    return re.fullmatch(r"[-+\d.,:/ ]+", value) is not None or len(value) > 40 or len(value.split()) > 3


def suggestion(form: RowFormat, missing: Collection[str], names: Sequence[str], sample: Sequence[Mapping[str, Any]]
               ) -> str:
    """Suggest a --column option for a file that lacks columns; "" if no suggestion is likely.

    Args:
        form: the columns that the task reads.
        missing: the task's names of the columns that were not found.
        names: names of the file's columns that may be suggested.
        sample: the file's first rows.
    """
    found: dict[str, str] = {}
    for wanted in _in_order(form):
        free = [name for name in names if name not in found.values()]
        if wanted in missing and (one := _likely(wanted, free) or _by_values(wanted, form, free, sample)):
            found[wanted] = one
    chosen = next((columns for _, columns in form.kinds if set(columns) & set(missing) <= found.keys()
                   and set(columns) & found.keys()), ())
    beside = {form.answer.column} if form.answer else set()
    pairs = [f"{name}={shown(found[name])}" for name in (*chosen, *beside) if name in found]
    return f"--column {','.join(pairs)}" if pairs and not any({",", "="} & set(one) for one in found.values()) else ""


def _in_order(form: RowFormat) -> list[str]:
    answer = [form.answer.column] if form.answer else []
    return [*answer, *(name for _, columns in form.kinds for name in columns)]


def _likely(wanted: str, names: Sequence[str]) -> str | None:
    likely = _LIKELY.get(wanted, ())
    ranked = [(min(likely.index(word) for word in _words(name) & set(likely)), place, name)
              for place, name in enumerate(names) if _words(name) & set(likely)]
    return min(ranked)[2] if ranked else None


def _by_values(wanted: str, form: RowFormat, names: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> str | None:
    """Find a column by its values: for texts the longest ones, for answers a few short values that recur."""
    values = {name: each for name, each in _values(names, sample).items() if each}
    if wanted == "text":
        lengths = {name: sum(map(len, each)) / len(each) for name, each in values.items()}
        return max(lengths, key=lengths.__getitem__) if lengths and max(lengths.values()) > _SHORT else None
    if form.answer is not None and wanted == form.answer.column:
        few = {name: len(set(each)) for name, each in values.items()
               if 1 < len(set(each)) <= min(_SUGGESTED_LABELS, len(each) / 2) and max(map(len, each)) <= 40}
        return min(few, key=few.__getitem__) if few else None
    return None
