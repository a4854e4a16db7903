"""Predictions for rows: label and probability of each, as a table to write, and the figures where rows have labels."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedlora.console import messages
from fedlora.data import Rows, labelled_by
from fedlora.data.problems import FIRST, places
from fedlora.figures import for_people
from fedlora.memory import memory_advice
from fedlora.tasks import Task

log = logging.getLogger(__name__)

FILE, LINE, LABEL, PROBABILITY = "file", "line", "predicted_label", "probability"
"""Columns of the table: the first if there are several files; columns that are kept stand after the second."""


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of rows.

    Attributes:
        probabilities: [rows, labels] the probability of each label; NaN for a row that the model cannot read.
        labels: names of the labels.
        figures: the figures on the rows that have one of these labels; empty if none has.
    """

    probabilities: np.ndarray
    labels: tuple[str, ...]
    figures: Mapping[str, float]


def predicted(task: Task, model: torch.nn.Module, rows: Rows, *, device: torch.device,
              batch_size: int | None = None) -> Predictions:
    """Predict rows, with a progress bar on a terminal, and warn about those that cannot be predicted or counted.

    Args:
        task: the run's task, with its labels.
        model: the adapted model, on the device.
        rows: the rows, with or without labels.
        device: where to compute.
        batch_size: rows computed at once; None to limit rows, tokens and outputs instead.

    Raises:
        ValueError: the model can read no row.
        MemoryError: memory ran out. The message says what helps.
    """
    labels: tuple[str, ...] = task.labels  # type: ignore[attr-defined]  # every task with labels has them
    number = {name: place for place, name in enumerate(labels)}
    truth = [number.get(name or "") for name in labelled_by(rows, labels).labels or ()]
    # a row without a label is given one so that it is encoded; its loss counts nowhere
    whole = replace(rows, labels=tuple(labels[0 if place is None else place] for place in truth), otherwise=None)
    records = task.encode(whole)
    lost = _without_record(task, whole) if records.left_out else set()
    usable = np.array([row for row in range(len(rows)) if row not in lost], np.int64)
    _warn(rows, lost, truth)
    if not len(usable):
        raise ValueError("no row has a text that the model can read")
    with _progress(len(usable)) as done, memory_advice("the prediction", "lower --batch-size, or give --device cpu"):
        values = task.measured(model, records, micro_batch=batch_size, device=device, done=done)
    probabilities = np.full((len(rows), len(labels)), np.nan)
    probabilities[usable] = values["probabilities"]
    known = np.array([truth[row] is not None for row in usable])
    figures = task.summarize({name: value[known] for name, value in values.items()}) if known.any() else {}
    return Predictions(probabilities, labels, figures)


def _without_record(task: Task, rows: Rows) -> set[int]:
    """Return the rows that the tokenizer makes nothing of, or that are cut before the end that the model reads."""
    def search(some: Sequence[int]) -> Iterator[int]:
        if task.encode(rows.take(some)).left_out:
            if len(some) == 1:
                yield some[0]
            else:
                yield from search(some[:len(some) // 2])
                yield from search(some[len(some) // 2:])

    return set(search(range(len(rows))))


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], object]]:
    """Show on a terminal how many rows are done; the block gets a function that takes the number of further ones."""
    console = messages()
    with Progress(TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
                  transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=rows)
        yield lambda count: bar.advance(task, count)


def _warn(rows: Rows, lost: Collection[int], truth: Sequence[int | None]) -> None:
    """Warn about rows without a prediction, and about labels that are not the run's."""
    if lost:
        log.warning("%s no token that the model can read, or %s cut before the end at which it reads them, and get no "
                    "label: %s", counted(len(lost), "row has", "rows have"), "is" if len(lost) == 1 else "are",
                    places([rows.where(row) for row in sorted(lost)[:FIRST]], len(lost)))
    others = [row for row, name in enumerate(rows.labels or ()) if name is not None and truth[row] is None]
    if others:
        log.warning("%s a label that is not one of the run's, and no part in the figures: %s. --label-map gives labels "
                    "another name", counted(len(others), "row has", "rows have"),
                    places([rows.where(row) for row in others[:FIRST]], len(others)))


def counted(count: int, one: str, several: str) -> str:
    """Return a number with its noun: "1 row has", "2,000 rows have"."""
    return f"{count:,} {one if count == 1 else several}"


def check_kept(keep: Sequence[str], labels: Sequence[str]) -> None:
    """Check that no column to keep has the name of another one that is written.

    Args:
        keep: names of the columns to keep.
        labels: names of the run's labels.

    Raises:
        ValueError: a name is taken.
    """
    taken = [FILE, LINE, LABEL, PROBABILITY, *map(_probability_of, labels), *keep]
    if twice := sorted({name for name in keep if taken.count(name) > 1}):
        raise ValueError(f"--keep {twice[0]}: a column of this name is written anyway, or it is named twice; leave it "
                         "out")


def _probability_of(label: str) -> str:
    return f"probability_{label}"


def as_table(found: Predictions, rows: Rows, keep: Sequence[str], kept: Sequence[tuple[Any, ...]], *,
             every: bool = False) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the names of the table's columns, and its rows.

    Args:
        found: the predictions.
        rows: the rows.
        keep: names of columns to keep.
        kept: the cells of each row in these columns.
        every: whether the probability of every label has a column of its own.
    """
    several = len(rows.files) > 1
    names = [*([FILE] if several else []), LINE, *keep, LABEL, PROBABILITY,
             *(_probability_of(label) for label in found.labels if every)]
    table = []
    for row, own in enumerate(found.probabilities):
        place = [str(rows.files[rows.file_of[row]])] if several else []
        best = None if np.isnan(own).any() else int(own.argmax())
        told = [None if best is None else round(float(one), 6) for one in (own.max(), *(own if every else ()))]
        table.append((*place, int(rows.lines[row]), *kept[row], None if best is None else found.labels[best], *told))
    return names, table


def written(names: Sequence[str], table: Sequence[tuple[Any, ...]], suffix: str) -> str:
    """Return a table as the text of a file.

    Args:
        names: names of the columns.
        table: the cells of each row.
        suffix: ".jsonl", ".tsv" or ".csv".
    """
    if suffix == ".jsonl":
        return "".join(json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False, default=str) + "\n"
                       for cells in table)
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if cell is None else cell for cell in cells] for cells in table])
    return out.getvalue()


def shown_figures(found: Mapping[str, float]) -> Table:
    """Return the figures as a table, each with its 95 % interval."""
    rows = counted(int(found["count"]), "row", "rows")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{rows} with a label of the run")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval")
    for row in for_people(found):
        table.add_row(*row)
    return table
