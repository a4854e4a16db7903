"""The pages of `fedlora-client check`: short tables on files, labels, tokens, duplicates, privacy and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.data import Overview, shown
from fedlora.data.problems import FIRST
from fedlora.quantities import duration, quantity
from fedlora.records import Records
from fedlora.task import Task

from .row_figures import Duplicates, Label, Lengths, Units

MOST_FILES = 20
MOST_LABELS = 20
MOST_SPELLINGS = 4
"""Most files, labels, and other spellings of a label that are listed."""

MOST_CHARACTERS = 2000
"""Most characters of a record that are shown."""

Line = tuple[str, str, str]
"""What is counted, the number, and a remark."""


def section(console: Console, title: str, lines: Iterable[Line]) -> None:
    """Print a heading and a table under it, whose numbers are aligned on the right.

    Args:
        console: where to print.
        title: the heading.
        lines: the rows of the table.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, number, remark in lines:
        table.add_row(f"  {name}", number, remark)
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def _more(count: int, most: int, what: str) -> list[Line]:
    return [(f"and {count - most:,} more {what}", "", "")] if count > most else []


def files(overview: Overview) -> list[Line]:
    """Return lines on the files: rows, columns that are read, and other columns."""
    lines: list[Line] = []
    for one in overview.files[:MOST_FILES]:
        read = [shown(name) if name == column else f"{shown(name)} from {shown(column)}"
                for name, column in one.taken.items()]
        others = [shown(name) for name in one.columns if name not in one.taken.values()]
        rest = f"; not read: {', '.join(others[:8])}{' …' if len(others) > 8 else ''}" if others else ""
        left = "".join(f"; {count:,} rows without a {lacks} left out" for lacks, count in one.left_out.items())
        count = f"{one.rows:,} {'row' if one.rows == 1 else 'rows'}"
        lines.append((shown(one.file), count, f"{', '.join(read)}{rest}{left}"))
    return lines + _more(len(overview.files), MOST_FILES, "files")


def labels(found: Sequence[Label], rows: int, unlabelled: int, *, private_place: bool) -> list[Line]:
    """Return lines on the labels.

    Args:
        found: the labels, the most frequent one first.
        rows: number of rows.
        unlabelled: number of rows without a label.
        private_place: whether spellings, and labels that are not declared, may be shown.
    """
    listed = [one for one in found if private_place or one.declared]
    lines: list[Line] = []
    for one in listed[:MOST_LABELS]:
        name = shown(one.name if len(one.name) <= 40 else f"{one.name[:40]}…")
        spelled = list(one.spellings.items())
        ways = ", ".join(f"{text[:40]!r} {count:,} times" for text, count in spelled[:MOST_SPELLINGS])
        more = " …" if len(spelled) > MOST_SPELLINGS else ""
        also = f"also written {ways}{more}" if spelled and private_place else ""
        lines.append((name, f"{one.count:,}", "   ".join(filter(None, [f"{one.count / rows:6.1%}", also]))))
    lines += _more(len(listed), MOST_LABELS, "labels")
    if len(listed) < len(found):
        lines.append(("labels that are not declared", f"{len(found) - len(listed):,}", "named on a terminal alone"))
    if unlabelled:
        lines.append(("rows without a label", f"{unlabelled:,}", "not used"))
    return lines


def units(found: Units, rows_per_unit: int) -> list[Line]:
    """Return lines on the rows of each unit of privacy.

    Args:
        found: the figures.
        rows_per_unit: the most rows of a unit that enter a step.
    """
    beyond = f"at most {rows_per_unit} of a unit enter a step (--rows-per-unit)" if found.beyond else ""
    return [("units", f"{found.count:,}", "what is protected as a whole, and what every number of records below "
                                          "counts"),
            ("rows of a unit: fewest", f"{found.least:,}", ""), ("median", f"{found.median:,.6g}", ""),
            ("most", f"{found.most:,}", ""),
            (f"units of more than {rows_per_unit} rows", f"{found.beyond:,}", beyond)]


def duplicates(found: Mapping[bool, Duplicates]) -> list[Line]:
    """Return lines on rows that are there twice, apart from capitals and blanks.

    Args:
        found: as `fedlora_client.row_figures.duplicates` returns them.
    """
    lines: list[Line] = []
    for across, one in found.items():
        more = f" and {one.count - FIRST:,} more" if one.count > FIRST else ""
        lines.append(("across files" if across else "within a file", f"{one.count:,}", ", ".join(one.first) + more))
    if otherwise := sum(one.otherwise for one in found.values()):
        lines.append(("of these with another answer", f"{otherwise:,}", ""))
    return lines


def tokens(found: Lengths, records: int, left_out: Mapping[str, int]) -> list[Line]:
    """Return lines on the records' lengths, and on rows that give no record.

    Args:
        found: the figures.
        records: number of records.
        left_out: reason → number of rows that the run leaves out.
    """
    lost = f"{found.cut / records:.1%} of the records, which lose {found.share:.1%} of all tokens" if found.cut else ""
    return [("shortest", f"{found.least:,}", ""), ("median", f"{found.median:,}", ""),
            ("95 % have at most", f"{found.nearly_all:,}", ""), ("longest", f"{found.most:,}", ""),
            ("records that are cut", f"{found.cut:,}", lost),
            *((f"left out: {why}", f"{count:,}", "") for why, count in left_out.items() if count)]


def time_of(steps: Sequence[float], local_steps: int, rounds: int) -> list[Line]:
    """Return lines on the time of a round and of a run.

    Args:
        steps: seconds of the steps that were measured.
        local_steps: steps of a round.
        rounds: rounds of the run.
    """
    middle = float(np.median(steps))
    spread = f"{_seconds(local_steps * min(steps))} to {_seconds(local_steps * max(steps))}"
    return [("a step", _seconds(middle), f"{len(steps)} were measured"),
            (f"a round of {local_steps}", _seconds(local_steps * middle), spread),
            (f"{rounds} rounds", duration(rounds * local_steps * middle), "without waiting for the others")]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def memory(batch: int, used: int, of: int | None, what: str) -> Line:
    """Return a line on the memory that was needed.

    Args:
        batch: expected number of records in a step.
        used: bytes.
        of: bytes that there are; None if that is not known.
        what: the memory of what.
    """
    there = f", of {quantity(of)}" if of else ""
    return "memory", quantity(used), f"the most that {what} has used{there}: a step of {batch:,} fits"


def as_seen(task: Task, records: Records) -> Text:
    """Return the first record as the model sees it. What a language model learns to write is underlined.

    Args:
        task: the task, whose tokenizer made the record.
        records: at least one record.
    """
    ids = records.tokens[:records.offsets[1]]
    learned = np.zeros(len(ids), bool) if records.answers is None else records.answers[:len(ids)].astype(bool)
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    text = Text()
    for first, last in pairwise(cuts):
        piece = task.tokenizer.decode(ids[first:last].tolist(), clean_up_tokenization_spaces=False)
        text.append(shown(piece), style="underline" if learned[first] else "")
    if len(text) > MOST_CHARACTERS:
        text.truncate(MOST_CHARACTERS, overflow="ellipsis")
    return text
