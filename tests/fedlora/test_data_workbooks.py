"""Workbooks (.xlsx): the right sheet, cells as they are meant, and places by sheet and row."""

from __future__ import annotations

import datetime
import logging
import re
import sys
import zipfile
from pathlib import Path

import pytest

from fedlora.data import ReadOptions, packing
from fedlora.tasks import read
from tests.fedlora.data_files import SECRET, refusal, write

openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")

HEAD = ("text", "label")
ROWS = [HEAD, ("pain since noon", 1), ("no complaints", 0)]


def book(path: Path, *sheets: list[tuple], change=lambda book: None) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for number, rows in enumerate(sheets, start=1):
        sheet = made.create_sheet(f"Sheet {number}")
        for row in rows:
            sheet.append(row)
    change(made)
    made.save(path)
    return path


def rewritten(path: Path, part: str, change) -> Path:
    """Change one part of a workbook, as another program would have written it."""
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts[part] = change(parts[part].decode()).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            new.writestr(name, content)
    return path


def test_a_workbook_gives_the_rows_of_its_only_sheet_with_their_places(tmp_path, caplog):
    path = book(tmp_path / "a.xlsx", [*ROWS, (None, None), ("fever", 1)])
    with caplog.at_level(logging.WARNING):
        rows = read(tmp_path, "classification")
    assert (rows.texts, rows.labels) == (("pain since noon", "no complaints", "fever"), ("1", "0", "1"))
    assert rows.where(2) == f"{path}, sheet Sheet 1:row 5" and rows.files == (str(path),)
    assert rows.take([2]).where(0) == rows.where(2) and not caplog.messages


@pytest.mark.parametrize(("value", "label"), [(1, "1"), (1.0, "1"), (True, "True"), ("1.0", "1"), (" a ", "a"),
                                              (0.5, "0.5"), ("#N/A", None), ("NA", None), (None, None)])
def test_numbers_are_labels_and_texts_as_they_are_written(tmp_path, value, label):
    path = book(tmp_path / "a.xlsx", [HEAD, (2024, value), ("line_x000D_\nline", "b")])
    rows = read(path, "classification")
    assert rows.texts == ("2024", "line\r\nline") and rows.labels == (label, "b")


@pytest.mark.parametrize(("row", "said"), [
    ((datetime.date(2024, 5, 1), 1, 7), "text is of type datetime. It must be a string"),
    ((SECRET, datetime.datetime(2024, 5, 1), 7), "the label is of type datetime"),
    ((SECRET, 1, datetime.time(12)), "the id is of type time"), (("#REF!", 1, 7), "the text is an error"),
    ((SECRET, 1, 1234567890123456), "the id is a number of more than 15 digits"),
    ((None, 1, 7), "text is missing or empty"), ((SECRET, 1, 7, "beside"), "Name every column in the first row")])
def test_a_cell_that_is_no_text_or_not_exact_is_refused_by_sheet_and_row(tmp_path, row, said):
    path = book(tmp_path / "a.xlsx", [(*HEAD, "id"), ("x", 0, 8), row])
    message = refusal(path, unit="id")
    assert f"{path}, sheet Sheet 1:row 3" in message
    assert said in message


def test_the_sheet_is_the_only_one_with_the_columns_or_the_named_one(tmp_path, caplog):
    path = book(tmp_path / "a.xlsx", [("label", "meaning"), (1, "yes")], ROWS)
    with caplog.at_level(logging.WARNING):
        assert read(path, "classification").where(0) == f"{path}, sheet Sheet 2:row 2"
    assert "of its sheets Sheet 1, Sheet 2, only Sheet 2 has the needed columns" in caplog.text
    assert "several sheets of the workbook have the needed columns: Sheet 1, Sheet 2" in refusal(
        book(path, ROWS, ROWS[:2]))
    for name in ("Sheet 2", "sheet 2 "):
        assert len(read(path, "classification", options=ReadOptions(sheet=name))) == 1
    options = ReadOptions(sheet="Sheet 3")
    assert "has no visible sheet Sheet 3; it has: Sheet 1, Sheet 2" in refusal(path, options=options)


def test_without_the_columns_the_first_sheet_is_described(tmp_path):
    rows = [("note", "klass"), *((f"a text of words {i}", i % 2) for i in range(4))]
    path = book(tmp_path / "a.xlsx", rows, [("x",)])
    message = refusal(path)
    assert f"{path}, sheet Sheet 1:row 1" in message and "its columns are: note, klass" in message
    assert message.endswith("Perhaps --column text=note,label=klass")
    path = book(tmp_path / "b.xlsx", [(f"{SECRET} has HIV", "positive"), ("another", "negative")])
    assert "if the file has no header line, add one" in refusal(path)


def test_hidden_rows_are_read_and_said_and_hidden_sheets_are_not(tmp_path, caplog):
    def hide(made):
        made["Sheet 1"].row_dimensions[3].hidden = True
        made["Sheet 2"].sheet_state = "veryHidden"

    path = book(tmp_path / "a.xlsx", ROWS, ROWS, change=hide)
    with caplog.at_level(logging.WARNING):
        assert len(read(path, "classification")) == 2
    assert f"{path}, sheet Sheet 1:row 3: the row is hidden, by a filter perhaps" in caplog.text

    rewritten(book(path, ROWS), "xl/workbook.xml",
              lambda xml: xml.replace(' state="visible"', "").replace("<sheet ", '<sheet state="hidden" '))
    assert "the workbook has no visible sheet" in refusal(path)


def test_merged_cells_are_refused_where_they_hide_a_value(tmp_path):
    path = book(tmp_path / "a.xlsx", [*ROWS, (None, 1)], change=lambda made: made["Sheet 1"].merge_cells("A3:A4"))
    assert f"{path}, sheet Sheet 1:row 3: cells are merged" in refusal(path)
    beside = [(*row, "remark") for row in ROWS]
    path = book(tmp_path / "b.xlsx", beside, change=lambda made: made["Sheet 1"].merge_cells("C2:D3"))
    assert len(read(path, "classification")) == 2


def test_formulas_have_their_stored_results_or_are_refused(tmp_path):
    path = book(tmp_path / "a.xlsx", [*ROWS, ("fever", "=B2"), ("chills", "=B3")])
    message = refusal(path)
    assert f"row 4, {path}, sheet Sheet 1:row 5: the label is a formula whose result is not stored" in message
    rewritten(path, "xl/worksheets/sheet1.xml", lambda xml: re.sub(r"(</f>)<v ?/?>(</v>)?", r"\1<v>1</v>", xml))
    assert read(path, "classification").labels == ("1", "0", "1", "1")


def test_wrong_sizes_that_programs_write_do_not_hide_cells(tmp_path):
    path = book(tmp_path / "a.xlsx", ROWS)
    rewritten(path, "xl/worksheets/sheet1.xml",
              lambda xml: re.sub(r'<dimension ref="[^"]*"', '<dimension ref="A1"', xml))
    assert len(read(path, "classification")) == 2


@pytest.mark.parametrize("content", [b"PK\x03\x04 and so on", b"x", b""])
def test_what_is_no_workbook_is_refused(tmp_path, content):
    (tmp_path / "a.xlsx").write_bytes(content)
    assert "the workbook cannot be read: it is damaged, or no .xlsx. Save it again" in refusal(tmp_path)


def test_a_workbook_with_a_damaged_part_or_a_password_is_refused(tmp_path):
    path = rewritten(book(tmp_path / "a.xlsx", ROWS), "xl/worksheets/sheet1.xml", lambda xml: xml[:len(xml) // 2])
    assert "the workbook cannot be read" in refusal(path)
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    assert "an old or an encrypted Office document" in refusal(path)


def test_a_workbook_that_unpacks_to_far_more_than_tables_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "ALWAYS", 1 << 20)
    path = book(tmp_path / "a.xlsx", ROWS)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/zeros", b"\0" * (16 << 20))
    assert "unpacks to more than 200 times its size" in refusal(path)


def test_where_openpyxl_is_not_installed_it_is_named(tmp_path, monkeypatch):
    path = book(tmp_path / "a.xlsx", ROWS)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install 'openpyxl>=3.1'" in refusal(path)


def test_a_workbook_beside_other_data_is_left_out_and_alone_it_is_read(tmp_path, caplog):
    book(tmp_path / "a.xlsx", ROWS)
    write(tmp_path / "b.csv", list(HEAD), [("x", 1)])
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, "classification").texts == ("x",)
    assert "left out: a.xlsx (a workbook beside other data: to read it, name it" in caplog.text
    assert len(read(tmp_path / "a.xlsx", "classification")) == 2
