"""The four file formats and hub datasets, each as a stream of (line, {column: value}).

Text formats are read line by line with the standard library, because neither pyarrow nor `datasets` can say on which
line of a file a row stands. An error names file, line and remedy, and never quotes a row: it may be a patient's.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.data.rows import place

Record = tuple[int, dict[str, Any]]

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")

_LONGEST_FIELD = 16 * 1024 * 1024


def records(file: Path) -> Iterator[Record]:
    """Every row of a file with its line number (row number in parquet), both counted from 1.

    Raises:
        ValueError: the file cannot be read as what its suffix says.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _jsonl(file)
        elif suffix == ".parquet":
            yield from _parquet(file)
        else:
            yield from _delimited(file, "\t" if suffix == ".tsv" else ",")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or type(error).__name__}. "
                         "Check the path and its permissions") from None


def show_columns(names: list[str] | tuple[str, ...]) -> str:
    """The columns for an error message, unless they look like a row of a file that has no header."""
    if any(len(name) > 40 or len(name.split()) > 4 or re.fullmatch(r"[-+\d.,:/ ]*", name) for name in names):
        return "its first line does not look like column names; add a header line that names the columns"
    return f"its columns are: {', '.join(names)}"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines as text with their numbers. A UTF-8 byte-order mark is dropped; anything but UTF-8 is an error."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ValueError(f"{place(str(file), 1)} is UTF-16 or UTF-32, not UTF-8. "
                                     f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > new{file.suffix}")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in raw:
                raise ValueError(f"{place(str(file), number)} holds a zero byte, so it is not UTF-8 text. "
                                 "Save the file as UTF-8 text")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place(str(file), number)} is not UTF-8 at byte {error.start + 1} of the line. "
                                 f"If it is Latin-1 or Windows text: iconv -f WINDOWS-1252 -t UTF-8 {file.name} "
                                 f"> new{file.suffix}") from None


def _jsonl(file: Path) -> Iterator[Record]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = place(str(file), number)
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            hint = (" The file seems to be one JSON array: write one object per line instead, without the brackets"
                    if number == 1 and line.lstrip().startswith("[") else " Write one complete object per line")
            raise ValueError(f"{where} is not valid JSON (at character {error.colno}).{hint}") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{where} is JSON nested too deeply or with a number too long. "
                             "Write one flat object per line") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where} is a JSON {type(row).__name__}, not an object. '
                             'Write one object per line: {"text": …, "label": …}')
        yield number, row


def _delimited(file: Path, delimiter: str) -> Iterator[Record]:
    """CSV or TSV with a header line. An empty field is None. A row's line is the one on which it begins."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise ValueError(f"{place(str(file), number)} is not valid {file.suffix[1:].upper()}: a quotation mark is "
                             "not closed, or not doubled inside a quoted field. Quote the field and double the "
                             "quotation marks in it") from None
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) != len(header) or "" in header:
                raise ValueError(f"{place(str(file), number)} must name every column once, but a name is empty or "
                                 "repeated. Correct the header line")
            continue
        if len(fields) != len(header):
            raise ValueError(f"{place(str(file), number)} has {len(fields)} fields, the header has {len(header)}. "
                             "Quote fields that contain the separator, a quotation mark or a line break")
        yield number, {name: field or None for name, field in zip(header, fields, strict=True)}


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, UnicodeDecodeError):
        raise ValueError(f"{place(str(file), number + 1)} cannot be read: the file is damaged or not parquet. "
                         "Write it again") from None


def hub_records(name: str, *, allow_download: bool) -> Iterator[Record]:
    """Rows of a dataset on the Hugging Face hub, named "org/dataset", "org/dataset/config", with ":split" or without.

    The split is "train" unless named. Only data files are read, never a loading script.

    Args:
        allow_download: False takes what the hub's cache on this machine has, and asks no one else.
    Raises:
        ValueError: the hub or the dataset cannot be reached.
    """
    import datasets

    path, _, split = name.partition(":")
    organisation, dataset, *config = path.split("/")
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not allow_download
    try:
        loaded = datasets.load_dataset(f"{organisation}/{dataset}", *config, split=split or "train")
    except Exception as error:
        found = (f"the hub did not give a dataset of that name ({type(error).__name__}). Check the path"
                 if allow_download else
                 "no such dataset is in the hub's cache. Check the path, add --allow-download")
        raise ValueError(f"{name!r} is no file or folder here, and {found}, or download the dataset and name its folder"
                         ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    yield from enumerate(loaded, start=1)
