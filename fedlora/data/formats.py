"""The four file formats and hub datasets, each as a stream of (line, {column: value}).

Text formats are read line by line with the standard library, because neither pyarrow nor `datasets` can say on which
line of a file a row stands. An error names file, line and remedy, and never quotes a row: it may be a patient's.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedlora.data.rows import place

Record = tuple[int, dict[str, Any]]

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")

_LONGEST_FIELD = 16 * 1024 * 1024

_TSV_REMEDY = ("A .tsv file has one line for each row, and no field holds a tab or a line break, quoted or not. "
               "Replace them with blanks, or write the file as .jsonl or .csv")

_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon"}


def records(file: Path, wanted: Collection[str]) -> Iterator[Record]:
    """Every row of a file with its line number (row number in parquet), both counted from 1.

    Args:
        wanted: the columns that will be looked at. In a parquet file's rows the others are named, and None: they are
            not read, whatever they hold.
    Raises:
        ValueError: the file cannot be read as what its suffix says.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _jsonl(file)
        elif suffix == ".parquet":
            yield from _parquet(file, wanted)
        else:
            yield from _table(file, _tsv(file) if suffix == ".tsv" else _csv(file))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or type(error).__name__}. "
                         "Check the path and its permissions") from None


def show_columns(file: str, names: Collection[str], usual: Collection[str]) -> str:
    """The columns for an error message, unless they may be a row of a file that has no header.

    Args:
        names: the file's columns.
        usual: names of which a header of CSV or TSV has at least one, in whatever capitals.
    """
    like_text = any(len(name) > 40 or len(name.split()) > 4 or re.fullmatch(r"[-+\d.,:/ ]*", name) for name in names)
    if file.lower().endswith((".csv", ".tsv")):
        if like_text or {name.casefold() for name in usual}.isdisjoint(name.casefold() for name in names):
            return ("its first line does not look like column names (it is not shown, since it may be a row); if the "
                    "file has no header line, add one")
    elif like_text:
        return "its column names look like text, so they are not shown"
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
            if _bare_return(line):
                raise _bare_returns(file, number) from None
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


def _table(file: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    """Rows of fields, the first of which is the header, by column. An empty field is None, an empty line no row."""
    header: list[str] | None = None
    for number, fields in rows:
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) != len(header) or "" in header:
                raise ValueError(f"{place(str(file), number)} must name every column once, but a name is empty or "
                                 "repeated. Correct the header line")
            continue
        if len(fields) != len(header):
            remedy = (_TSV_REMEDY if file.suffix.lower() == ".tsv" else
                      "Quote fields that contain the separator, a quotation mark or a line break")
            raise ValueError(f"{place(str(file), number)} has {len(fields)} fields, the header has {len(header)}. "
                             f"{remedy}")
        yield number, {name: field or None for name, field in zip(header, fields, strict=True)}


def _csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row, with the line on which it begins."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in _separated(file, ",")), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line character" in str(error):
                raise _bare_returns(file, number) from None
            raise ValueError(f"{place(str(file), number)} is not valid CSV: a quotation mark is not closed, or not "
                             "doubled inside a quoted field. Quote the field and double the quotation marks in it"
                             ) from None


def _tsv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line, with its number.

    Some programs write TSV without any quoting, so that a field may begin with a quotation mark; others quote a field
    that holds one, a tab or a line break, and double the marks in it. A line is one row whatever its marks: read
    otherwise, a stray mark would make one record of two people's rows. Hence

        field                                     is
        "said ""no"" twice"                       said "no" twice, as each field that is quoted and closed on its line
        "so it began                              the same, mark included, as every other stray mark
        quoted, and with a tab or a line break    an error: its line has too many or too few fields, or is the only
                                                  field of its line and not closed there

    Where each line of a quoted field happens to have as many fields as the header, which takes tabs in it as well as
    line breaks, nothing tells it from rows, and it is read as rows.
    """
    for number, line in _separated(file, "\t"):
        line = line.rstrip("\r\n")
        fields = line.split("\t") if line else []
        if len(fields) == 1 and line.startswith('"') and line.count('"') % 2:
            raise ValueError(f"{place(str(file), number)} begins with a quotation mark that is not closed on this "
                             f"line. {_TSV_REMEDY}")
        yield number, [_unquoted(file, number, field) for field in fields]


def _unquoted(file: Path, number: int, field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    if "\r" in field:
        raise _bare_returns(file, number)
    return field


def _separated(file: Path, separator: str) -> Iterator[tuple[int, str]]:
    """The lines of a table, the first of which is looked at for other separators and other ends of lines."""
    first = True
    for number, line in _lines(file):
        if first and line.strip():
            first = False
            if _bare_return(line):
                raise _bare_returns(file, number)
            found = [] if separator in line else [other for other in _SEPARATORS if other in line.strip()]
            if found:
                ending = {",": " (or name the file .csv)", "\t": " (or name the file .tsv)"}.get(found[-1], "")
                raise ValueError(
                    f"{place(str(file), number)} has a {_SEPARATORS[found[-1]]} and no {_SEPARATORS[separator]}. "
                    f"Separate the fields by {_SEPARATORS[separator]}s{ending}, and add a header line if there is none")
        yield number, line


def _bare_return(line: str) -> bool:
    return "\r" in line.rstrip("\r\n")


def _bare_returns(file: Path, number: int) -> ValueError:
    return ValueError(f"{place(str(file), number)} holds a carriage return (\\r) without a line feed (\\n); lines must "
                      f"end in \\n or \\r\\n. Convert the file: tr '\\r' '\\n' < {file.name} > new{file.suffix}")


def _parquet(file: Path, wanted: Collection[str]) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    taken: list[str] = []
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            taken = [name for name in names if name in wanted]
            for batch in table.iter_batches(batch_size=4096, columns=taken):
                for row in batch.to_pylist():
                    number += 1
                    yield number, dict.fromkeys(names) | row
    except (pa.ArrowException, UnicodeDecodeError):
        raise ValueError(f"{place(str(file), number + 1)} cannot be read: the file is damaged or not parquet. "
                         "Write it again") from None
    except (ValueError, OverflowError):
        raise ValueError(f"{place(str(file), number + 1)} or one after it holds a value that Python has no type for, "
                         f"like a date out of range, in one of the columns {', '.join(taken)}. Write it as a string"
                         ) from None


def hub_records(name: str, *, allow_download: bool) -> Iterator[Record]:
    """Rows of a dataset on the Hugging Face hub, named "org/dataset", "org/dataset/config", with ":split" or without.

    The split is "train" unless named. Only data files are read, never a loading script. Where the dataset numbers
    its classes, -1 is a missing label, as the hub has it.

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
    classes = [column for column, feature in loaded.features.items() if isinstance(feature, datasets.ClassLabel)]
    for number, row in enumerate(loaded, start=1):
        yield number, row | {column: None for column in classes if row[column] == -1}
