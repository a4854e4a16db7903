"""Reading of CSV and TSV files with the standard library, which can say on which line a row begins."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fedlora.data.columns import Needs
from fedlora.data.encoding import LONGEST
from fedlora.data.grid import Grid, Record
from fedlora.data.lines import add_bare_return, lines_of
from fedlora.data.options import ReadOptions
from fedlora.data.problems import Problems
from fedlora.data.rows import place
from fedlora.data.separators import Lines, separated

_TSV_REMEDY = ("A .tsv file has one line for each row, and no field holds a tab or a line break, quoted or not. "
               "Replace them with blanks, or write the file as .jsonl or .csv")


def table(file: Path, needs: Needs, options: ReadOptions, problems: Problems, read_as: dict[str, str]
          ) -> Iterator[Record]:
    """Yield each row as {column: value}, with the number of the line on which it begins.

    An empty field becomes None. An empty line is not a row.

    Args:
        file: the file.
        needs: the columns that the task needs.
        options: the separator and the encoding, if the owner names them.
        problems: takes the faults and remarks.
        read_as: takes phrases that say which separator and encoding were found, unless they are the usual ones.
    """
    found = separated(file, lines_of(file, options.encoding, problems, read_as), options.delimiter, needs, problems,
                      read_as)
    if found is None:
        return
    separator, lines = found
    tabs = separator == "\t" and file.name.lower().removesuffix(".gz").endswith(".tsv")
    remedy = _TSV_REMEDY if tabs else ("Quote fields that contain the separator, a quotation mark or a line break, or "
                                       "name the separator with --delimiter")
    rows = _tsv(file, lines, problems) if tabs else _csv(file, lines, separator, problems)
    yield from Grid(partial(place, str(file)), problems, remedy).records(rows)


def _csv(file: Path, lines: Lines, separator: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each row of a CSV file, with the number of the line on which it begins."""
    csv.field_size_limit(LONGEST)
    reader = csv.reader((line for _, line in lines), delimiter=separator, strict=True)
    columns = 0
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
            columns = columns or len(fields)
            if reader.line_num > number and _may_hold_rows(fields, columns, separator):
                problems.remark(place(str(file), number), "a quoted field has lines that look like rows", "If its "
                                "quotation mark is a stray one, several people's rows became one record: double the "
                                "mark")
            yield number, fields
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line character" in str(error):
                add_bare_return(file, number, problems)
                return
            if "limit" in str(error):
                problems.add(place(str(file), number), f"a field is longer than {LONGEST // 2**20} MiB: a quotation "
                             "mark is not closed, or the field is not text", "Close the quotation mark, or shorten the "
                             "field; the rest of the file was not checked")
                return
            problems.add(place(str(file), number), "the row is not valid CSV: a quotation mark is not closed, or not "
                         "doubled inside a quoted field", "Quote the field and double the quotation marks in it")


def _may_hold_rows(fields: list[str], columns: int, separator: str) -> bool:
    """Return whether the lines of one field look like rows of their own, which a stray quotation mark has joined.

    They do if all lines except the last have the right number of separators and end in something short, like a label.
    """
    for place_of, field in enumerate(fields):
        first, *inner = field.split("\n")[:-1] or [""]
        if (inner or place_of < columns - 1) and _ends_row(first, columns - place_of, separator) and all(
                _ends_row(line, columns, separator) for line in inner):
            return True
    return False


def _ends_row(line: str, fields: int, separator: str) -> bool:
    parts = line.split(separator)
    return len(parts) == fields and (fields == 1 or 0 < len(parts[-1].split()) <= 3)


def _tsv(file: Path, lines: Lines, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each line of a TSV file, with the line's number.

    Some programs write TSV without quoting, so that a field may begin with a quotation mark. Others quote a field that
    contains a quotation mark, a tab or a line break, and double the marks in it. Here each line is one row, whatever
    its marks. Otherwise a stray mark could make one record of two people's rows. Hence

        field                                     is read as
        "said ""no"" twice"                       said "no" twice; so is every field that is quoted and closed on its
                                                  line
        "so it began                              itself, with its mark; so is every other stray mark
        quoted, and with a tab or a line break    an error: its line has too many or too few fields, or has only this
                                                  field, which is not closed on it

    If every line of a quoted field happens to have as many fields as the header (the field must contain tabs as well as
    line breaks for that), it cannot be distinguished from rows, and is read as rows.
    """
    for number, line in lines:
        line = line.rstrip("\r\n")
        fields = line.split("\t") if line else []
        if len(fields) == 1 and line.startswith('"') and line.count('"') % 2:
            problems.add(place(str(file), number), "the line begins with a quotation mark that is not closed on it",
                         _TSV_REMEDY)
            continue
        if "\r" in line:
            add_bare_return(file, number, problems)
            return
        yield number, [_unquoted(field) for field in fields] if '"' in line else fields


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field
