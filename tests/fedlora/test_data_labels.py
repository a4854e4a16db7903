"""Labels that files write otherwise than the run, and incomplete rows: mapped, read or left out, with counts."""

from __future__ import annotations

import json
import logging

import pytest

from fedlora.config import ClientConfig, read_config
from fedlora.data import ReadOptions, check_labels, kept_cells, labelled_by, rows_in_other_capitals, unanswered
from fedlora.privacy.ledger.fingerprints import fingerprints
from fedlora.tasks import read
from fedlora.tasks.classification import Classification
from tests.fedlora.data_files import SECRET, refusal, write, write_lines
from tests.fedlora.test_data_as_it_comes import numbered

SUFFIXES = [".jsonl", ".csv", ".tsv", ".parquet"]


@pytest.fixture
def said(caplog):
    """Return a function that reads an input and returns its rows and the warnings about it."""
    def of(path, task: str = "classification", **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows = read(path, task, **options)
        assert SECRET not in caplog.text
        return rows, "\n".join(caplog.messages)

    return of


# --- --label-map ---

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_are_mapped_before_they_are_checked_or_announced_and_counted(tmp_path, suffix, said):
    labels = ["dringend", "URGENT", " dringend ", "routine", "NA", None]
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [(f"note {i}", one) for i, one in enumerate(labels)])
    names = {"dringend": "urgent", "URGENT": "urgent", "NA": "unknown", "selten": "routine"}
    rows, message = said(path, declared=("urgent", "routine", "unknown"), options=ReadOptions(label_map=names))
    assert rows.labels == ("urgent", "urgent", "urgent", "routine", "unknown", None)
    assert "dringend is read as urgent 2 times, URGENT is read as urgent 1 times, NA is read as unknown 1" in message
    assert "no row has the label selten of --label-map" in message and "1 of 6 rows have an empty label" in message
    check_labels(rows, ("urgent", "routine", "unknown"))


def test_numbers_and_names_of_numbered_classes_are_mapped_and_no_chain_is_followed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"text": "x", "label": one} for one in (1, 1.0, "1", 0)))
    swapped = ReadOptions(label_map={"1": "0", "0": "1"})
    assert read(path, "classification", options=swapped).labels == ("0", "0", "0", "1")
    path = numbered(tmp_path / "b.parquet", [1, 0, -1])
    rows = read(path, "classification", options=ReadOptions(label_map={"good": "well"}))
    assert rows.labels == ("well", "bad", None) and labelled_by(rows, ("0", "1")).labels == ("well", "0", None)


def test_a_label_map_is_read_from_the_command_line_and_normalised(capsys):
    options = read_config(ClientConfig, ["--label-map=dringend = urgent,1.0=yes", "--label-map=ＡＢ=c"])
    assert options.read_options().label_map == {"dringend": "urgent", "1": "yes", "AB": "c"}
    for given in ("dringend", "a=b,a=c", "a=", "=b", "a=b=c"):
        with pytest.raises(SystemExit):
            read_config(ClientConfig, [f"--label-map={given}"])
        assert "--label-map" in capsys.readouterr().err


def test_a_task_without_labels_refuses_a_label_map(tmp_path):
    path = write(tmp_path / "a.csv", ["text"], [("x",)])
    options = ReadOptions(label_map={"a": "b"})
    assert "--label-map: causal-lm has no labels" in refusal(path, "causal-lm", options=options)


def test_neither_a_label_map_nor_capitals_nor_a_format_make_other_records_of_the_same_ones(tmp_path):
    """Else a second budget could be opened for the same people."""
    rows = [("note one", "dringend", "7"), ("note two", "Routine", "8"), ("ümlaut", "routine", "8")]
    openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
    book = openpyxl.Workbook()
    for row in (("text", "label", "patient"), *((text, label, int(unit)) for text, label, unit in rows)):
        book.active.append(row)
    book.save(tmp_path / "d.xlsx")
    path = write(tmp_path / "a.csv", ["text", "label", "patient"], rows)
    (tmp_path / "b.csv").write_bytes(path.read_text("utf-8").replace(",", ";").encode("cp1252"))
    (tmp_path / "c.tsv").write_bytes(path.read_text("utf-8").replace(",", "\t").encode("utf-16"))
    found = [fingerprints(read, b"k" * 32, read.units) for read in (
        read(path, "classification", unit="patient"),
        read(path, "classification", unit="patient", options=ReadOptions(label_map={"dringend": "urgent"})),
        read(path, "classification", unit="patient", declared=("dringend", "routine")),
        *(read(tmp_path / name, "classification", unit="patient") for name in ("b.csv", "c.tsv", "d.xlsx")))]
    assert len(found[0]) == 5 and all(one == found[0] for one in found)


# --- Blanks and capitals ---

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_blanks_around_labels_are_left_out_and_counted(tmp_path, suffix, said):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("x", "a"), ("y", "a "), ("z", " a")])
    rows, message = said(path)
    assert rows.labels == ("a", "a", "a") and "the label has blanks around it. They are left out" in message
    assert message.count("a" + suffix) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_in_other_capitals_are_read_as_the_declared_ones_and_counted(tmp_path, suffix, said):
    labels = ["Urgent", "URGENT", "urgent", "Routine", "straße", "STRASSE"]
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [(f"note {i}", one) for i, one in enumerate(labels)])
    rows, message = said(path, declared=("urgent", "routine", "Straße"))
    assert rows.labels == ("urgent",) * 3 + ("routine", "Straße", "Straße")
    assert "5 labels are read as the name in the label set that differs only in capitals" in message
    plain, message = said(path)
    assert plain.labels == tuple(labels), "without a label set nothing says which spelling is meant"
    assert "differ from another only in capitals, and count as different classes unless" in message
    assert rows_in_other_capitals(plain, ("urgent", "routine")) == [0, 1, 3]
    assert labelled_by(plain, ("urgent", "routine")).labels[:4] == ("urgent", "urgent", "urgent", "routine")


def test_a_row_without_a_label_is_none_in_other_capitals(tmp_path, said):
    path = write(tmp_path / "a.csv", ["text", "label"], [("x", "URGENT"), ("y", ""), ("z", "routine")])
    rows, message = said(path, declared=("urgent", "routine"))
    assert f"{path}:2: 1 labels are read as" in message and rows.labels == ("urgent", None, "routine")


# --- Rows to predict ---

FORM = unanswered(Classification.rows)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_to_predict_need_no_label_and_keep_what_they_have(tmp_path, suffix, said):
    bare = write(tmp_path / f"a{suffix}", ["text", "ID"], [("one", "007"), ("two", "8")])
    rows, message = said(bare, answered=False)
    assert rows.texts == ("one", "two") and rows.labels == (None, None) and not message
    assert kept_cells(rows, ["id"], FORM) == [("007",), ("8",)]
    with pytest.raises(ValueError, match="has no column ward to keep"):
        kept_cells(rows, ["id", "ward"], FORM)
    some = write(tmp_path / f"b{suffix}", ["text", "label"], [("one", "urgent"), ("two", None)])
    rows, message = said(some, answered=False, options=ReadOptions(skip_incomplete=True))
    assert rows.labels == ("urgent", None) and not message, "a row without a label is whole"
    assert "there is no column label" in refusal(bare)


def test_cells_to_keep_are_those_of_the_sheet_and_the_separator_that_were_read(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
    book = openpyxl.Workbook()
    book.active.append(["ID", "remark"])
    sheet = book.create_sheet("notes")
    for row in (["text", "ID"], ["one", 7], ["", None], ["two", 8]):
        sheet.append(row)
    book.save(tmp_path / "a.xlsx")
    (tmp_path / "b.csv").write_text("text;ID\n\"one;\nmore\";9\ntwo;10\n", encoding="utf-8")
    for name, expected in (("a.xlsx", [("7",), ("8",)]), ("b.csv", [("9",), ("10",)])):
        rows = read(tmp_path / name, "classification", answered=False)
        assert kept_cells(rows, ["ID"], FORM) == expected
        assert kept_cells(rows.take([1]), ["ID"], FORM) == expected[1:]


def test_a_label_like_two_names_of_the_set_is_refused_and_the_very_names_are_kept(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [("x", "Yes"), ("y", "yes"), ("z", "no")])
    assert labelled_by(read(path, "classification"), ("Yes", "yes", "no")).labels == ("Yes", "yes", "no")
    rows = read(write(tmp_path / "b.csv", ["text", "label"], [("x", "YES")]), "classification")
    with pytest.raises(ValueError, match=r"b\.csv:2: the label is not in the label set.*--label-map"):
        check_labels(rows, ("Yes", "yes", "no"))


def test_a_word_for_a_missing_value_in_other_capitals_is_no_label(tmp_path):
    rows = read(write(tmp_path / "a.csv", ["text", "label"], [("x", "None"), ("y", "mild")]), "classification")
    assert labelled_by(rows, ("none", "mild")).labels == (None, "mild")


# --- --skip-incomplete ---

SKIP = ReadOptions(skip_incomplete=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_without_a_text_or_a_label_are_left_out_and_counted_by_file(tmp_path, suffix, said):
    rows = [("one", "a", "p"), (None, "a", "p"), ("two", None, "q"), (" ", "b", None), ("three", "NA", "r")]
    path = write(tmp_path / f"a{suffix}", ["text", "label", "pid"], rows)
    write(tmp_path / f"b{suffix}", ["text", "label", "pid"], [("four", "b", "s"), (None, None, "t")])
    read_, message = said(tmp_path, unit="pid", options=SKIP)
    assert read_.texts == ("one", "three", "four") and read_.units == ("p", "r", "s")
    assert read_.labels == ("a", None, "b") and read_.otherwise == (None, "NA", None), "a word may be a class's name"
    assert f"a{suffix}: of its rows, 1 without a label and 2 without a text are left out" in message
    assert f"b{suffix}: of its rows, 1 without a text are left out" in message
    assert read_.where(1) == f"{path}:{dict(zip(SUFFIXES, ('5', '6', '6', 'row 5'), strict=True))[suffix]}"


def test_without_the_option_the_fault_names_it(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [("x", 1), (None, 1)])
    assert f"{path}:3: text is missing or empty. Fill it, remove the row, or add --skip-incomplete" in refusal(path)


def test_pairs_completions_and_conversations_are_left_out_where_a_part_is_missing(tmp_path, said):
    path = write(tmp_path / "a.csv", ["text_a", "text_b", "label"], [("x", "y", 1), ("z", None, 0)])
    rows, message = said(path, options=SKIP)
    assert rows.seconds == ("y",) and "1 without a text are left out" in message
    path = write(tmp_path / "b.csv", ["prompt", "completion"], [("x", "y"), ("z", None), (None, "w")])
    rows, message = said(path, "causal-lm", options=SKIP)
    assert rows.texts == ("x",) and "1 without a text and 1 without an answer are left out" in message.replace(
        "1 without an answer and 1 without a text", "1 without a text and 1 without an answer")
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    path = write_lines(tmp_path / "c.jsonl", {"messages": turns}, {"messages": None}, {"messages": []},
                       {"messages": turns[:1]}, {"messages": [turns[0], {"role": "assistant", "content": ""}]},
                       {"messages": json.dumps(turns)})
    rows, message = said(path, "causal-lm", options=SKIP)
    assert len(rows) == 2 and "1 without an answer and 3 without a text" in message


def test_what_is_wrong_and_not_just_missing_stays_a_fault(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": 3, "label": 1}, {"text": "x", "label": [SECRET]},
                       {"text": "x", "label": 1, "pid": None})
    message = refusal(path, options=SKIP)
    assert "text is of type int" in message and "the label is of type list" in message
    path = write(tmp_path / "b.csv", ["text", "label", "pid"], [("x", 1, None)])
    assert "so it is unknown whose row this is" in refusal(path, unit="pid", options=SKIP)


def test_a_file_of_which_no_row_is_complete_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label", "pid"], [(None, 1, 1), ("x", None, 2)])
    assert f"{path}: no row of the file is complete" in refusal(path, options=SKIP)
