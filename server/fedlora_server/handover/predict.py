"""The command fedlora-server predict: gives the label and its probability for each row of a file."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import Parser, faults_in_words
from fedlora.config import values as parse

from .arguments import add_device, add_model, offline_unless

if TYPE_CHECKING:  # imported late, so that --help is quick
    from fedlora.data import ReadOptions, Rows

    from .stored_run import StoredRun

FORMATS = (".csv", ".tsv", ".jsonl")
STDOUT = Path("-")
"""Stands for stdout as the file to write."""


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server predict", usage="fedlora-server predict RUN FILE [--out FILE] [--keep COLUMN,…] [options]",
        description="Give the label and its probability for each row of a file, by the adapter of a run after its last "
        "finished round. Rows need no label; where they have one, figures are shown.",
        epilog="exit codes: 0 predicted; 2 wrong input, or a file cannot be read or written; 130 interrupted by Ctrl-C")
    made.add_argument("run", type=parse.path, metavar="RUN", help="the run's folder")
    made.add_argument("file", type=parse.text, metavar="FILE", help="a .jsonl, .csv, .tsv, .parquet or .xlsx file, a "
                      "folder of such files, or a hub dataset")
    made.add_argument("--out", type=parse.path, metavar="FILE", help="file to write, which must be new: .csv, .tsv or "
                      ".jsonl; - for stdout [predictions.csv, or .tsv or .jsonl as FILE is]")
    made.add_argument("--keep", type=parse.names, action="extend", default=[], metavar="COLUMN,…", help="columns of "
                      "FILE to write too, such as an id; texts are not written otherwise")
    made.add_argument("--probabilities", action="store_true", help="write the probability of every label, in a column "
                      "of its own")
    add_model(made)
    add_device(made, "rows computed at once [as many as a limit on tokens allows]")
    data = made.add_argument_group("how FILE is read")
    data.add_argument("--column", type=parse.columns, metavar="NAME=COLUMN,…", help="which column holds which field, "
                      "as in text=note,label=triage [that of the run]")
    data.add_argument("--delimiter", type=parse.delimiter, metavar="CHAR", help="character between the fields, or one "
                      "of the words comma, semicolon, tab, bar [found in each file]")
    data.add_argument("--encoding", type=parse.encoding, metavar="NAME", help="encoding of text files [found in each "
                      "file]")
    data.add_argument("--sheet", type=parse.text, metavar="NAME", help="sheet of a workbook [the only one with the "
                      "needed columns, or the first]")
    data.add_argument("--label-map", type=parse.label_map, default={}, metavar="LABEL=NAME,…", help="the run's names "
                      "for labels of FILE")
    data.add_argument("--skip-incomplete", action="store_true", help="leave out rows without a text, and say how many")
    return made


@faults_in_words("fedlora-server predict")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 predicted, 2 wrong input, 130 interrupted."""
    options = parser().parse_args(argv)
    offline_unless(options.allow_download)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        _predict(options)
    except KeyboardInterrupt:
        print("fedlora-server predict: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _predict(options: argparse.Namespace) -> None:
    """Read the rows, predict, write, and show the figures if rows have labels.

    Raises:
        ValueError: the run, the base model or the rows cannot be used, or the file to write exists.
    """
    from fedlora.data import kept_cells, unanswered
    from fedlora.files import replace_file
    from fedlora.tasks import task_for, task_named
    from fedlora.training.precision import resolve_device

    from .predictions import as_table, check_kept, predicted, written
    from .stored_run import stored_run

    run = stored_run(options.run)
    kind = task_named(run.plan.task)
    if not kind.has_labels:
        remedy = f"fedlora-server generate {options.run} writes texts" if kind.auto_class.__name__.endswith(
            "CausalLM") else "load its adapter with the code in its README.md"
        raise ValueError(f"the run in {options.run} trained {kind.model_is}, which has no labels to predict; {remedy}")
    device, out = resolve_device(options.device), _free(options.out, options.file)
    check_kept(options.keep, run.plan.labels)
    read_options, columns = _read_options(options), _columns(options, run)
    rows = _read(options, run, columns, read_options)
    kept = kept_cells(rows, options.keep, unanswered(kind.rows), columns=columns, options=read_options)
    adapted = run.adapted(options.model, allow_download=options.allow_download)
    adapted.model.to(device)  # type: ignore[arg-type]  # transformers annotates it for `self` alone
    task = task_for(run.plan, adapted.tokenizer)
    found = predicted(task, adapted.model, rows, device=device, batch_size=options.batch_size)
    text = written(*as_table(found, rows, options.keep, kept, every=options.probabilities),
                   _suffix(options.file) if out == STDOUT else out.suffix.lower())
    if out == STDOUT:
        sys.stdout.write(text)
    else:
        replace_file(out, text.encode(), 0o666)
    _tell(found.figures, len(rows), out, options.file)


def _suffix(file: str) -> str:
    """Return the suffix of the file to write, by that of the file that is read."""
    plain = file.lower().removesuffix(".gz")
    return next((suffix for suffix in (".jsonl", ".tsv") if plain.endswith(suffix)), ".csv")


def _free(out: Path | None, file: str) -> Path:
    """Return the file to write.

    Raises:
        ValueError: it exists, or its name ends in none of `FORMATS`.
    """
    path = out or Path(f"predictions{_suffix(file)}")
    if path == STDOUT:
        return path
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {path} does not end in {', '.join(FORMATS)}, which are the formats to write")
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists; name another file with --out, or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it, or name another one")
    return path


def _read_options(options: argparse.Namespace) -> ReadOptions:
    from fedlora.data import ReadOptions

    return ReadOptions(options.delimiter, options.encoding, options.sheet, options.label_map, options.skip_incomplete)


def _columns(options: argparse.Namespace, run: StoredRun) -> Mapping[str, str]:
    given = options.column if options.column is not None else run.options.get("column")
    return {str(name): str(column) for name, column in given.items()} if isinstance(given, Mapping) else {}


def _read(options: argparse.Namespace, run: StoredRun, columns: Mapping[str, str], read_options: ReadOptions) -> Rows:
    """Read FILE, whose rows need no label."""
    from fedlora.tasks import read, task_named

    rows = read(options.file, run.plan.task, columns=columns, allow_download=options.allow_download,
                declared=run.plan.labels, held_out=True, options=read_options, answered=False)
    answer = task_named(run.plan.task).rows.answer
    if answer is not None and answer.column in (options.column or {}) and not any(rows.labels or ()):
        raise ValueError(f"--column {answer.column}={columns[answer.column]}: {options.file} has no such column, or "
                         "nothing in it; correct the name, or leave it out if there are no labels")
    if not len(rows):
        raise ValueError(f"{options.file} holds no row to predict")
    return rows


def _tell(found: Mapping[str, float], rows: int, out: Path, file: str) -> None:
    """Show the figures, and say where the predictions are."""
    from fedlora.console import messages

    from .predictions import counted, shown_figures

    console = messages()
    if found:
        console.print(shown_figures(found))
    elif out != STDOUT:
        console.print(f"No row of {file} has a label of the run, so no figures are shown.")
    if out != STDOUT:
        console.print(f"{counted(rows, 'row is', 'rows are')} labelled in {out}.", soft_wrap=True)
