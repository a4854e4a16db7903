"""The names of columns: which is meant, which may be shown, which is likely the one that is looked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.data.rows import shown, spelling

KindOfRows = tuple[str, tuple[str, ...]]
"""One of `fedlora.data.rows.KINDS`, and the columns that hold it."""


@dataclass(frozen=True)
class Answer:
    """The column with what a model is to say of a text.

    Attributes:
        column: its name, where --column gives no other.
        parse: a cell's value as the task takes it, None where there is none. It raises TypeError for any other; the
            message says what the value is ("a fraction"), and never holds it. Words that stand for a missing value do
            not come to it.
        remedy: how to write it, for the owner of a cell that does not parse.
    """

    column: str
    parse: Callable[[object], Any]
    remedy: str


@dataclass(frozen=True)
class RowFormat:
    """What the files of a task hold.

    Attributes:
        kinds: of rows, each with its columns; the first whose columns are there is taken.
        answer: a column beside them; None where the rows themselves hold what is learned.
        otherwise: ends the error about columns that are not there.
    """

    kinds: tuple[KindOfRows, ...]
    answer: Answer | None = None
    otherwise: str = ""


def column_names(form: RowFormat) -> set[str]:
    """All columns that rows can have, but for that of the unit."""
    return {name for _, columns in form.kinds for name in columns} | ({form.answer.column} if form.answer else set())


def required(kind_of_rows: KindOfRows) -> tuple[str, ...]:
    """The columns that each row has; the second of a pair may be empty or absent."""
    kind, columns = kind_of_rows
    return columns[:1] if kind == "pair" else columns


def folded(name: str) -> str:
    """Names of columns are one where they differ in capitals, outer blanks or invisible characters alone."""
    return spelling(name).casefold()


def find_column(wanted: str, present: Collection[str]) -> str | None:
    """The column that is meant: the one of that very name, else the only one that is the same when `folded`."""
    if wanted in present:
        return wanted
    alike = [name for name in present if folded(name) == folded(wanted)]
    return alike[0] if len(alike) == 1 else None


# --- What an error shows ---

_LIKELY: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "texts", "note", "notes", "sentence", "content", "body", "document", "comment", "comments",
             "review", "message", "description", "abstract", "report", "utterance", "tweet", "post", "question",
             "title", "transcript", "narrative", "summary", "befund", "texte", "texto"),
    "label": ("label", "labels", "class", "klass", "klasse", "category", "target", "sentiment", "diagnosis", "triage",
              "outcome", "intent", "topic", "rating", "gold", "annotation", "etikett", "y"),
    "prompt": ("prompt", "instruction", "question", "query", "input", "request"),
    "completion": ("completion", "output", "response", "answer", "reply", "target"),
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns")}
"""Names under which files of others have what a task calls by its own."""

_USUAL_WORDS = frozenset(name for names in _LIKELY.values() for name in names) | {
    "id", "idx", "index", "date", "patient", "pid", "name", "age", "sex", "split", "source"}

_SUGGESTED_LABELS = 20
_SHORT = 8
"""Characters: a column whose texts have as many on average is not proposed as one of texts."""


def show_columns(file: str, names: Sequence[str], usual: Collection[str], sample: Sequence[Mapping[str, Any]]) -> str:
    """The columns for an error message, unless they may be a row of a file that has no header.

    Args:
        names: the file's columns.
        usual: names of which any one tells a header.
        sample: the file's first rows.
    """
    if not _may_show(file, names, usual, sample):
        count = "one column" if len(names) == 1 else f"{len(names)} columns"
        if file.lower().endswith((".csv", ".tsv")):
            return (f"it has {count}, whose names are not shown, since the first line may be a row; if the file has no "
                    "header line, add one")
        return f"it has {count}, whose names look like text and are not shown"
    return f"its columns are: {', '.join(map(shown, names))}"


def _may_show(file: str, names: Sequence[str], usual: Collection[str], sample: Sequence[Mapping[str, Any]]) -> bool:
    """Only CSV and TSV can lack a header. There a usual name tells one, and so does a column without a value that could
    be a name, where no name comes again below itself.
    """
    if any(len(name) > 40 or len(name.split()) > 4 or re.fullmatch(r"[-+\d.,:/ ]*", name) for name in names):
        return False
    if not file.lower().endswith((".csv", ".tsv")) or {folded(name) for name in usual} & {folded(n) for n in names}:
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
    """The --column that may be meant, for a file whose columns can be shown; "" where none is likely.

    Args:
        missing: the task's names that are in the file under another one, if at all.
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
    """The longest texts, or short values that come again and again."""
    values = {name: each for name, each in _values(names, sample).items() if each}
    if wanted == "text":
        lengths = {name: sum(map(len, each)) / len(each) for name, each in values.items()}
        return max(lengths, key=lengths.__getitem__) if lengths and max(lengths.values()) > _SHORT else None
    if form.answer is not None and wanted == form.answer.column:
        few = {name: len(set(each)) for name, each in values.items()
               if 1 < len(set(each)) <= min(_SUGGESTED_LABELS, len(each) / 2) and max(map(len, each)) <= 40}
        return min(few, key=few.__getitem__) if few else None
    return None
