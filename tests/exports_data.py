"""Made-up exports as spreadsheets, databases and statistics programs write them, with what becomes of each.

`python -m tests.inputs_data --only export` prints what a client says about each.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Make = Callable[[Path], Any]

NOTES = (("Brustschmerzen seit heute früh; Übelkeit", "dringend"), ("Rezept, „wie immer“", "Routine"),
         ("Fieber über 39 °C\nseit Mittwoch", "dringend"), ('sagt "nein" zur Impfung – später', "Routine"))
"""Texts with separators, quotation marks and a line break, and their labels."""

TEXTS = tuple(text for text, _ in NOTES)
LINES = tuple((text.replace("\n", " "), label) for text, label in NOTES)


@dataclass(frozen=True)
class Export:
    """An export.

    Attributes:
        make: makes it in a folder.
        options: further options of fedlora-client.
        texts: the texts that are read; None if it is refused.
        says: what the warnings, or the refusal, have in them.
    """

    make: Make
    options: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = TEXTS
    says: tuple[str, ...] = ()


def file(name: str, content: bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def both(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def table(rows: Sequence[Sequence[Any]], separator: str = ",", *, end: str = "\r\n",
          quoting: int = csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue()


def workbook(name: str, sheets: dict[str, Sequence[Sequence[Any]]], change: Callable[[Any], Any] | None = None) -> Make:
    """Return a function that makes a workbook.

    Args:
        name: the file's name.
        sheets: name of each sheet → its rows.
        change: changes the workbook before it is saved.
    """
    def make(folder: Path) -> None:
        import openpyxl

        book = openpyxl.Workbook()
        book.remove(book.active)
        for title, rows in sheets.items():
            sheet = book.create_sheet(title)
            for row in rows:
                sheet.append(list(row))
        if change is not None:
            change(book)
        book.save(folder / name)

    return make


def _merge(book: Any) -> None:
    book["Daten"].merge_cells("B2:B3")


def _hide(book: Any) -> None:
    book["Daten"].row_dimensions[3].hidden = True
    book["Alt"].sheet_state = "hidden"


def plain(text: str) -> str:
    """Return a text with the punctuation of ASCII."""
    return text.translate({0x201E: "'", 0x201C: "'", 0x2013: "-"})


HEAD = ("Befund", "Triage")
NUMBERED = [(i, *row) for i, row in enumerate(NOTES)]
COLUMN = "--column=text=Befund,label=Triage"
GERMAN = "--label-map=dringend=urgent,Routine=routine"
LEGEND = (("Triage", "Bedeutung"), ("dringend", "sofort"), ("Routine", "nach Termin"))

EXPORTS: dict[str, Export] = {
    "Excel, German: CSV with semicolons in cp1252": Export(
        file("a.csv", table([HEAD, *NOTES], ";").encode("cp1252")), (COLUMN,),
        says=("read as Windows-1252 (cp1252) text, because it is not UTF-8, with semicolons between the fields",
              "If that is wrong, add --encoding or --delimiter")),
    "Excel: CSV UTF-8 with a mark and semicolons": Export(
        file("a.csv", table([HEAD, *NOTES], ";").encode("utf-8-sig")), (COLUMN,),
        says=("read with semicolons between the fields",)),
    "Excel: Unicode text (UTF-16, tabs) named .csv": Export(
        file("a.csv", table([HEAD, *NOTES], "\t").encode("utf-16")), (COLUMN,),
        says=("read by its mark as UTF-16 text, with tabs between the fields",)),
    "Excel: Unicode text (UTF-16, tabs) named .tsv": Export(
        file("a.tsv", table([HEAD, *LINES], "\t").encode("utf-16")), (COLUMN,), tuple(text for text, _ in LINES),
        ("read by its mark as UTF-16 text",)),
    "Excel: Unicode text named .txt": Export(
        lambda folder: (file("a.txt", table([HEAD, *NOTES], "\t").encode("utf-16"))(folder), folder / "a.txt")[1],
        (COLUMN,), None, ("if it is a table, name it .csv, or .tsv if tabs separate its fields",)),
    "Excel: a first line sep=;": Export(
        file("a.csv", ("sep=;\r\n" + table([HEAD, *NOTES], ";")).encode("utf-8-sig")), (COLUMN,),
        says=("read with the semicolon that its first line names",)),
    "Excel: empty columns and rows at the end": Export(
        file("a.csv", (table([(*HEAD, "", ""), *((*row, "", "") for row in NOTES)], ";") + ";;;\r\n" * 3).encode()),
        (COLUMN,), says=("a.csv:7, DATA/a.csv:8, DATA/a.csv:9: the row is empty. It is left out",)),
    "Excel: a line of totals": Export(
        file("a.csv", table([("Nr", *HEAD), *NUMBERED, ("Summe", "", 4)], ";").encode()),
        (COLUMN,), None, ("a.csv:7: the row at the end is a line of totals, and not a record. Remove it",)),
    "Excel for Mac: CSV (Macintosh)": Export(
        file("a.csv", table([HEAD, *NOTES], ";").encode("mac-roman")), (COLUMN,), None,
        ("the line is not UTF-8, and does not look like Windows-1252 text either", "--encoding cp850, mac-roman")),
    "Excel for Mac: CSV (Macintosh), said": Export(
        file("a.csv", table([HEAD, *NOTES], ";").encode("mac-roman")), (COLUMN, "--encoding=mac-roman"),
        says=("read with semicolons between the fields",)),
    "Excel: CSV (MS-DOS)": Export(
        file("a.csv", table([HEAD, *((plain(text), label) for text, label in NOTES)], ";").encode("cp850")),
        (COLUMN,), None,
        ("does not look like Windows-1252 text either",)),
    "LibreOffice: all texts quoted": Export(
        file("a.csv", table([HEAD, *NOTES], quoting=csv.QUOTE_ALL, end="\n").encode()), (COLUMN, GERMAN),
        says=("the label dringend is read as urgent 2 times, Routine is read as routine 2 times",)),
    "Google Sheets": Export(file("notes - Sheet1.csv", table([HEAD, *NOTES]).encode()), (COLUMN,)),
    "pandas: with its index": Export(
        file("a.csv", table([("", *HEAD), *NUMBERED], end="\n").encode()), (COLUMN,),
        says=("a.csv:1: the first column has no name, as where row numbers were exported. It is left out",)),
    "pandas: packed by gzip": Export(
        file("a.csv.gz", gzip.compress(table([HEAD, *NOTES], end="\n").encode())), (COLUMN,),
        says=("a.csv.gz: read unpacked by gzip",)),
    "R: write.csv": Export(
        file("a.csv", table([("", *HEAD), *NUMBERED, ("5", "ohne", "NA")], quoting=csv.QUOTE_ALL, end="\n"
                            ).replace('"NA"', "NA").encode()), (COLUMN,), (*TEXTS, "ohne"),
        ("the first column has no name", "have an empty label or a word that stands for a missing value (NA)")),
    "R: write.csv2 in Latin-1": Export(
        file("a.csv", table([("", *HEAD), *((i, plain(text), label) for i, text, label in NUMBERED)], ";",
                            quoting=csv.QUOTE_ALL, end="\n").encode("latin-1")), (COLUMN,), tuple(map(plain, TEXTS)),
        ("read as Windows-1252 (cp1252) text",)),
    "SPSS: padded labels and a mark": Export(
        file("a.csv", table([("ID", "BEFUND", "TRIAGE"), *((i, text, label.ljust(12))
                                                           for i, (text, label) in enumerate(NOTES))], ";"
                            ).encode("utf-8-sig")), ("--column=text=BEFUND,label=TRIAGE",),
        says=("and 1 more: the label has blanks around it. They are left out",)),
    "psql: COPY with a header": Export(
        file("a.csv", table([("id", "text", "label"), *NUMBERED, (9, "", "Routine"),
                             (10, "ohne Angabe", "")], end="\n").encode()), ("--skip-incomplete",),
        says=("of its rows, 1 without a label and 1 without a text are left out",)),
    "psql: COPY with a header and gaps": Export(
        file("a.csv", table([("id", "text", "label"), *NUMBERED, (9, "", "Routine")],
                            end="\n").encode()), (), None,
        ("a.csv:7: text is missing or empty. Fill it, remove the row, or add --skip-incomplete",)),
    "sqlcmd: a count of rows below": Export(
        file("a.csv", (table([("text", "label"), *NOTES]) + "\r\n(4 rows affected)\r\n").encode()), (), None,
        ("a.csv:8: the row at the end is a line of totals",)),
    "REDCap": Export(
        file("a.csv", table([("record_id", "redcap_event_name", "note", "triage"),
                             *((i, "visit_1_arm_1", *row) for i, row in enumerate(NOTES))]).encode()),
        ("--column=text=note,label=triage", "--privacy-unit=column:record_id")),
    "a table separated by vertical bars": Export(
        file("a.csv", table([HEAD, *NOTES], "|").encode()), (COLUMN,), says=("read with vertical bars between",)),
    "a table that two separators fit": Export(
        file("a.csv", b"text,note;label\nx,1;y\n"), (), None,
        ("a.csv:1: the first line can be read with commas or semicolons between the fields. Say which",)),
    "a workbook of two sheets": Export(
        workbook("a.xlsx", {"Legende": LEGEND, "Daten": [("Nr", *HEAD), *NUMBERED]}),
        (COLUMN,), says=("of its sheets Legende, Daten, only Daten has the needed columns and is read",)),
    "a workbook of two sheets with the same columns": Export(
        workbook("a.xlsx", {"2023": [HEAD, *NOTES], "2024": [HEAD, *NOTES]}), (COLUMN,), None,
        ("several sheets of the workbook have the needed columns: 2023, 2024. Name one with --sheet",)),
    "a workbook of two sheets, one named": Export(
        workbook("a.xlsx", {"2023": [HEAD, *NOTES], "2024": [HEAD, *NOTES[:2]]}), (COLUMN, "--sheet=2024"), TEXTS[:2]),
    "a workbook with a line of totals": Export(
        workbook("a.xlsx", {"Daten": [HEAD, *NOTES, (None, None), ("Gesamt", 4)]}), (COLUMN,), None,
        ("a.xlsx, sheet Daten:row 7: the row at the end is a line of totals",)),
    "a workbook with merged labels": Export(
        workbook("a.xlsx", {"Daten": [HEAD, *NOTES]}, _merge), (COLUMN,), None,
        ("a.xlsx, sheet Daten:row 2: cells are merged, so that only the first of them holds the value. Unmerge them",)),
    "a workbook with hidden rows and sheets": Export(
        workbook("a.xlsx", {"Daten": [HEAD, *NOTES], "Alt": [HEAD, *NOTES]}, _hide), (COLUMN,),
        says=("sheet Daten:row 3: the row is hidden, by a filter perhaps, and is read like all others",)),
    "a workbook whose formulas were never computed": Export(
        workbook("a.xlsx", {"Daten": [HEAD, *NOTES, ("Schwindel", "=B2")]}), (COLUMN,), None,
        ("sheet Daten:row 6: the Triage is a formula whose result is not stored. Open the workbook",)),
    "a workbook beside the CSV that was saved from it": Export(
        both(workbook("a.xlsx", {"Daten": [HEAD, *NOTES]}), file("b.csv", table([HEAD, *NOTES]).encode())), (COLUMN,),
        says=("left out: a.xlsx (a workbook beside other data",)),
}
