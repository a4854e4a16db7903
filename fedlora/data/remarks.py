"""Remarks on rows that may be read otherwise than their owner intends, and refusal of ambiguous ids of units."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from fedlora.data.problems import FIRST, Problems, places
from fedlora.data.rows import MISSING, Rows, label_names, rows_in_other_capitals, shown


def check_units(units: Sequence[str], where: Callable[[int], str], problems: Problems) -> None:
    """Note different ids that may be the same person's. If they are, that person is protected less than declared.

    Args:
        units: the normalised id of each row's unit.
        where: returns the place of a row, by its index, for messages.
        problems: takes the faults and remarks.
    """
    first: dict[str, int] = {}
    for row, unit in enumerate(units):
        first.setdefault(unit, row)
    bare: dict[str, str] = {}
    small: dict[str, str] = {}
    for unit, row in first.items():
        if re.fullmatch(r"\d([.,]\d+)?[eE]\+\d+", unit):
            problems.add(where(row), "the id is a number that a spreadsheet has rounded, as in 1.23E+11, so that it is "
                         "not known whose row this is", "Export the ids as text")
        if unit.isdigit() and unit != bare.setdefault(unit.lstrip("0"), unit):
            other = first[bare[unit.lstrip("0")]]
            problems.add(f"{where(row)} (see {where(other)})", "two ids differ only in leading zeros: a program that "
                         "took ids for numbers may have dropped zeros, and one person would be two units",
                         "Write the ids alike in all rows and files; put a letter before them if they are two people's")
        elif unit != small.setdefault(unit.casefold(), unit):
            problems.remark(f"{where(row)} (see {where(first[small[unit.casefold()]])})", "two ids differ only in "
                            "capitals, and count as two units", "Write them alike if they are one person's")


def remark_on(rows: Rows, words: Mapping[str, int], problems: Problems, *, declared: Collection[str] = ()) -> None:
    """Remark on everything in the rows that may be a mistake.

    Args:
        rows: the rows that were read.
        words: word that stands for a missing value → number of answers that held it.
        problems: takes the remarks.
        declared: the label set, if it is known.
    """
    _missing_answers(rows, words, declared, problems)
    _texts_that_are_words(rows, problems)
    _labels_alike(rows, problems)
    _numbered(rows, problems)
    _twice(rows, problems)


def remark_on_capitals(rows: Rows, declared: Collection[str], problems: Problems) -> None:
    """Remark on labels that are read as a declared one which differs only in capitals.

    Args:
        rows: the rows as they were read.
        declared: the label set.
        problems: takes the remark.
    """
    if others := rows_in_other_capitals(rows, declared):
        problems.remark(places([rows.where(row) for row in others[:FIRST]], len(others)),
                        f"{len(others):,} labels are read as the name in the label set that differs only in capitals",
                        "Give them another name with --label-map if that is wrong")


def _missing_answers(rows: Rows, words: Mapping[str, int], declared: Collection[str], problems: Problems) -> None:
    answers = rows.answers or ()
    lacking = [row for row, answer in enumerate(answers) if answer is None]
    found = sorted(word for word in words if word not in declared)
    if not lacking or (len(lacking) == len(answers) and not found):
        return  # if all are missing, that is an error for the caller that needs them
    some = f" or a word that stands for a missing value ({', '.join(found[:5])})" if found else ""
    named = (", unless the run's label set has that word: if it is the name of a class, name all classes with --labels"
             if found and rows.labels is not None else "")
    kind = "label" if rows.labels is not None else "answer"
    problems.remark(places([rows.where(row) for row in lacking[:FIRST]], len(lacking)),
                    f"{len(lacking):,} of {len(rows):,} rows have an empty {kind}{some}", f"They are not used{named}")


def _texts_that_are_words(rows: Rows, problems: Problems) -> None:
    for column in filter(None, (rows.texts if rows.kind != "messages" else (), rows.seconds)):
        for row, text in enumerate(column):
            if text is not None and len(text) < 8 and text.strip().casefold() in MISSING:
                problems.remark(rows.where(row), "the text is a word that stands for a missing value, and is kept as "
                                "it is", "Remove the row if it has no text")


def _labels_alike(rows: Rows, problems: Problems) -> None:
    alike: dict[str, set[str]] = defaultdict(set)
    for name in label_names(rows):
        alike[name.casefold()].add(name)
    several = {name for names in alike.values() if len(names) > 1 for name in names}
    if several:
        first = {label: row for row, label in reversed(list(enumerate(rows.labels or ()))) if label in several}
        problems.remark(places([rows.where(row) for row in sorted(first.values())], len(first)),
                        f"{len(several)} labels differ from another only in capitals, and count as different classes "
                        "unless the label set has only one of them",
                        "Write them alike if they are one class, or add --label-map NAME=NAME")
    fractions = [name for name in label_names(rows) if re.fullmatch(r"[-+]?\d*[.,]\d+", name)]
    if fractions:
        row = (rows.labels or ()).index(fractions[0])
        problems.remark(rows.where(row), f"{len(fractions)} labels are fractions, and count as different classes",
                        "Name the column with the classes with --column label=NAME if this one holds measurements")


def _numbered(rows: Rows, problems: Problems) -> None:
    """Remark on labels that are numbers in one file and have names in another."""
    if rows.labels is None or rows.otherwise is None or len(rows.files) < 2:
        return
    numbers = {other for label, other in zip(rows.labels, rows.otherwise, strict=True) if label and other}
    bare = [row for row, label in enumerate(rows.labels) if label in numbers and rows.otherwise[row] is None]
    if bare:
        problems.remark(places([rows.where(row) for row in bare[:FIRST]], len(bare)),
                        "the label is a number, and another file has a name for that number: they count as two classes",
                        "Write the labels alike in all files")


def _twice(rows: Rows, problems: Problems) -> None:
    """Remark on rows of one file that another file contains too."""
    if len(rows.files) < 2:
        return
    first: dict[int, int] = {}
    columns = [column for column in (rows.texts, rows.seconds, rows.messages) if column is not None]
    again: dict[tuple[int, int], int] = defaultdict(int)
    for content, file in zip(zip(*columns, strict=True), rows.file_of.tolist(), strict=True):
        if (other := first.setdefault(hash(content), file)) != file:
            again[file, other] += 1
    if again:
        most = sorted(again, key=lambda pair: -again[pair])
        pairs = [f"{shown(rows.files[file])} and {shown(rows.files[other])}" for file, other in most]
        if len(pairs) > 1:
            pairs = [f"{pair} ({again[both]:,})" for pair, both in zip(pairs, most, strict=True)]
        count = sum(again.values())
        problems.remark(places(pairs, len(pairs)),
                        f"{count:,} row{' has' if count == 1 else 's have'} the same text in both files",
                        "If one is a copy of the other, remove it: "
                        "a row that is there twice counts twice, and ε protects only one of the two")
