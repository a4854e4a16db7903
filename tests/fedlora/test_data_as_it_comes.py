"""Imperfect data files, as programs, people and disks leave them: read as intended, or refused with a message."""

from __future__ import annotations

import json
import logging
import os
import socket
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.config import ClientConfig, read_config
from fedlora.data import check_labels, label_names, labelled_by, labelled_otherwise
from fedlora.plan import unit_column
from fedlora.tasks import read
from tests.fedlora.data_files import SECRET, refusal, write, write_lines
from tests.inputs_data import INPUTS

SUFFIXES = [".jsonl", ".csv", ".tsv", ".parquet"]


@pytest.fixture
def said(caplog):
    """Return a function that reads an input and returns the warnings about it."""
    def of(path, task: str = "classification", **options) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read(path, task, **options)
        assert SECRET not in caplog.text
        return "\n".join(caplog.messages)

    return of


@pytest.mark.parametrize("what", INPUTS)
def test_every_input_of_the_table_is_read_or_refused_with_its_remedy(what, tmp_path, monkeypatch):
    make, given = INPUTS[what]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    options = read_config(ClientConfig, ["--data=x", *given])
    try:
        read(path if isinstance(path, (Path, str)) else tmp_path, options.task, columns=options.column,
             unit=unit_column(options.privacy_unit or "row"), declared=options.labels or (),
             options=options.read_options())
    except ValueError as refused:
        message = str(refused)
        assert ". " in message and len(message) < 2500 and message.replace("\n", "").isprintable()


# --- Values ---

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_word_for_a_missing_value_is_no_label_in_any_format_and_is_counted(tmp_path, suffix, said):
    labels = ["1", "NaN", "NA", "null", "None", "n/a", None, "0"]
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [(f"note {i}", one) for i, one in enumerate(labels)])
    assert read(path, "classification").labels == ("1", *[None] * 6, "0")
    assert "6 of 8 rows have an empty label" in said(path) and "(NA, NaN, None, n/a, null)" in said(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_label_set_that_has_the_word_makes_it_a_label(tmp_path, suffix, said):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("x", "none"), ("y", "mild"), ("z", "NA")])
    declared = read(path, "classification", declared=("none", "mild"))
    assert declared.labels == ("none", "mild", None)
    assert "(NA)" in said(path, declared=("none", "mild"))
    rows = read(path, "classification")
    assert label_names(rows) == ("mild",) and labelled_by(rows, ("none", "mild")).labels == declared.labels
    assert rows.take([2, 0]).otherwise == ("NA", "none")
    check_labels(rows, ("none", "mild"))
    assert labelled_otherwise(rows, ("none",)) == [1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_may_be_such_a_word_and_it_is_said(tmp_path, suffix, said):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("None", 1), ("x", 0), ("NA", 0)])
    assert read(path, "classification").texts == ("None", "x", "NA")
    assert "the text is a word that stands for a missing value, and is kept" in said(path)


def test_a_text_that_is_not_a_number_is_missing(tmp_path):
    assert "text is missing or empty" in refusal(write_lines(tmp_path / "a.jsonl", '{"text": NaN, "label": 1}'))


@pytest.mark.parametrize(("values", "labels"), [
    ([True, False, None], ("True", "False", None)), ([1.0, float("nan"), 0.0], ("1", None, "0")),
    ([Decimal("1.0"), None, Decimal(0)], ("1", None, "0"))])
def test_truth_values_and_whole_numbers_of_any_type_are_labels(tmp_path, values, labels):
    pq.write_table(pa.table({"text": ["x", "y", "z"], "label": values}), tmp_path / "a.parquet")
    assert read(tmp_path, "classification").labels == labels


def numbered(path: Path, labels: list[int], texts: str = "abcdefgh", names=("bad", "good")) -> Path:
    features = {"label": {"names": list(names), "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    table = pa.table({"text": list(texts[:len(labels)]), "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def test_numbered_classes_have_their_names_and_fit_a_label_set_of_numbers_too(tmp_path, said):
    path = numbered(tmp_path / "a.parquet", [1, 0, -1])
    rows = read(path, "classification")
    assert rows.labels == ("good", "bad", None) and labelled_by(rows, ("0", "1")).labels == ("1", "0", None)
    assert "1 of 3 rows have an empty label. They are not used" in said(path)
    assert "a number that has no name" in refusal(numbered(tmp_path / "b.parquet", [0, 2]))
    write(tmp_path / "c.csv", ["text", "label"], [("x", 1)])
    (tmp_path / "b.parquet").unlink()
    assert f"{tmp_path / 'c.csv'}:2: the label is a number, and another file has a name" in said(tmp_path)


def test_metadata_that_no_dataset_library_wrote_names_no_class(tmp_path):
    for held in (b"{", b"[]", b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}'):
        table = pa.table({"text": ["x"], "label": [1]}).replace_schema_metadata({b"huggingface": held})
        pq.write_table(table, tmp_path / "a.parquet")
        assert read(tmp_path, "classification").labels == ("1",)


def test_labels_that_differ_in_capitals_or_are_fractions_are_said(tmp_path, said):
    path = write(tmp_path / "a.csv", ["text", "label"], [("x", "Yes"), ("y", "yes"), ("z", "no"), ("w", "0.5")])
    assert f"{path}:2, {path}:3: 2 labels differ from another only in capitals" in said(path)
    assert "1 labels are fractions" in said(path)


# --- Faults ---

def test_faults_are_collected_by_kind_with_their_number_and_first_places(tmp_path):
    rows = [{"text": "fine", "label": 1}]
    faults = [{"text": " ", "label": SECRET}, {"text": SECRET, "label": [SECRET]}, f'{{"text": "{SECRET}']
    message = refusal(write_lines(tmp_path / "a.jsonl", *rows, *(faults[i % 3] for i in range(40))))
    at = tmp_path / "a.jsonl"
    assert message.startswith("40 faults of 3 kinds")
    assert f"{at}:2, {at}:5, {at}:8 and 11 more: text is empty" in message
    assert f"{at}:3, {at}:6, {at}:9 and 10 more: the label is of type list" in message
    assert "and 10 more: the line is not valid JSON" in message and len(message.splitlines()) == 4


def test_faults_of_all_files_are_collected(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n,1\n")
    (tmp_path / "b.csv").write_text("note,label\nx,1\n")
    (tmp_path / "c.csv").write_text("")
    (tmp_path / "d.csv").write_bytes("text,label\nü,0\n".encode() + b"\xe4,1\nx\xe4,1\n")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 no")
    message = refusal(tmp_path)
    assert all(f"{tmp_path / name}" in message for name in ("a.csv", "b.csv", "c.csv", "d.csv", "e.parquet"))
    assert f"{tmp_path / 'd.csv'}:3 (byte 1), {tmp_path / 'd.csv'}:4 (byte 2): the line is not UTF-8" in message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_header_that_comes_again_is_refused_by_its_line(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("x", "1"), ("text", "label"), ("y", "0")])
    where = {".jsonl": ":2", ".parquet": ":row 2"}.get(suffix, ":3")
    assert f"{path}{where}: the row repeats" in refusal(path)


@pytest.mark.parametrize("again", ["\ufefftext,label,pid", "label,text,pid", "TEXT,Label,pid", '"text","label","pid"'])
def test_a_header_that_comes_again_is_known_in_any_order_and_capitals(tmp_path, again):
    path = tmp_path / "a.csv"
    path.write_text(f"\ufefftext,label,pid\nfirst,1,7\n{again}\nsecond,0,7\n", "utf-8")
    assert f"{path}:3: the row repeats the header" in refusal(path)


def test_a_row_with_one_value_like_the_header_is_a_row(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [("text", 1), ("x", "label")])
    assert read(path, "classification").texts == ("text", "x")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_field_of_more_than_16_mib_is_refused_by_its_line(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("x", 1), ("y" * (17 << 20), 0)])
    where = {".jsonl": ":2", ".parquet": ":row 2"}.get(suffix, ":3")
    assert f"{path}{where}: " in refusal(path) and "longer than 16 MiB" in refusal(path)


def test_a_quotation_mark_that_swallows_a_large_file_is_refused_where_it_opens(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\nx,1\n"so it goes,1\n' + "a text of a row,0\n" * (1 << 20))
    assert f"{path}:3: a field is longer than 16 MiB: a quotation mark is not closed" in refusal(path)


def test_rows_that_a_quotation_mark_has_joined_are_said_and_a_letter_is_none(tmp_path, said):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"so it goes,1\nfine,0\nshe said ",1\n"Dear Smith,\nplease see him,\nyours",0\n')
    assert f"{path}:2: a quoted field has lines that look like rows" in said(path)


def test_a_name_twice_in_an_object_or_a_schema_is_refused(tmp_path):
    twice = f'{{"text": "{SECRET}", "label": 1, "text": "x"}}'
    path = write_lines(tmp_path / "a.jsonl", {"text": "x", "label": 1}, twice)
    assert f"{path}:2: the object has the same name twice" in refusal(path)
    write_lines(path, {"text": 'says "text" and "label"', "label": 1, "x": {"text": 1}})
    assert len(read(path, "classification")) == 1
    columns = [pa.array(["x"]), pa.array(["y"]), pa.array([1])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text", "label"]), tmp_path / "b.parquet")
    assert "two columns have the same name" in refusal(tmp_path / "b.parquet")


@pytest.mark.parametrize(("start", "remedy"), [
    (b"\x1f\x8b\x08", ".gz"), (b"PK\x03\x04", "name it .xlsx"), (b"PAR1", "Name it .parquet"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<!doctype html><html>", "Download")])
def test_a_file_of_another_kind_than_its_name_says_is_known(tmp_path, start, remedy):
    for suffix in (".csv", ".jsonl"):
        (tmp_path / f"a{suffix}").write_bytes(start + b"\xff")
        assert remedy in refusal(tmp_path / f"a{suffix}")


# --- Columns ---

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_are_known_in_any_capitals_and_with_blanks_and_that_is_said(tmp_path, suffix, said):
    path = write(tmp_path / f"a{suffix}", ["TEXT", "Label ", "Patient"], [("x", 1, "p")])
    rows = read(path, "classification", unit="patient")
    assert (rows.texts, rows.labels, rows.units) == (("x",), ("1",), ("p",))
    assert "the column TEXT is taken for text" in said(path) and "is taken for label" in said(path)
    assert read(path, "classification", columns={"text": "text", "label": "LABEL"}).texts == ("x",)


def test_of_two_columns_alike_none_is_guessed_and_the_very_name_goes_first(tmp_path):
    path = write(tmp_path / "a.csv", ["Text", "TEXT", "label"], [("x", "y", 1)])
    assert "several are called text, apart from capitals" in refusal(path)
    assert read(path, "classification", columns={"text": "TEXT"}).texts == ("y",)
    path = write(tmp_path / "b.csv", ["Text", "text", "Label", "LABEL"], [("x", "y", 1, 2)])
    assert "several columns are called label, apart from capitals" in refusal(path)
    assert read(path, "classification", columns={"label": "LABEL"}).texts == ("y",)


@pytest.mark.parametrize(("columns", "likely"), [
    (["note", "klass"], "--column text=note,label=klass"), (["id", "review", "Sentiment"],
                                                            "--column text=review,label=Sentiment"),
    (["patient_note", "triage_level"], "--column text=patient_note,label=triage_level"),
    (["Befund", "Kennung"], "--column text=Befund,label=Kennung"), (["text", "klass"], "--column label=klass")])
def test_a_header_without_our_names_is_shown_with_what_is_likely_meant(tmp_path, columns, likely):
    rows = [(f"a text of several words, number {i}", i % 2) for i in range(6)]
    rows = [(i, *row) for i, row in enumerate(rows)] if len(columns) == 3 else rows
    for suffix in SUFFIXES:
        path = write(tmp_path / f"a{suffix}", columns, rows)
        message = refusal(path)
        assert f"its columns are: {', '.join(columns)}" in message and message.endswith(f"Perhaps {likely}")
        read(path, "classification", columns=dict(pair.split("=") for pair in likely.split()[1].split(",")))


@pytest.mark.parametrize("first", [(SECRET, "positive"), ("Zyxwv", "positive"), ("Zyxwv", "1"),
                                   ("Zyxwv", "a note"), ("Zyxwv", "no comment")])
def test_a_row_in_place_of_a_header_is_not_shown_nor_proposed(tmp_path, first):
    others = [("Other", "negative"), ("Another", "positive"), ("Zyxwv", "negative")]
    path = write(tmp_path / "a.csv", list(first), others)
    assert "Zyxwv" not in refusal(path) and "may be a row" in refusal(path)


def test_one_column_cannot_be_two_things(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [("x", 1)])
    assert "for both text and label" in refusal(path, columns={"text": "note", "label": "note"})
    assert "does not say whose rows" in refusal(path, unit="text")


def test_an_option_names_a_column_once(capsys):
    options = read_config(ClientConfig, ["--column=text = note , label=klass"])
    assert options.column == {"text": "note", "label": "klass"}
    with pytest.raises(SystemExit):
        read_config(ClientConfig, ["--column=text=note,text=body"])
    assert "names two columns for the same field" in capsys.readouterr().err


# --- Folders ---

def test_splits_that_are_not_for_training_are_left_out_and_said(tmp_path, said):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / f"{name}.csv", ["text", "label"], [(name, 1)])
    assert [name[:8] for name in read(tmp_path, "classification").texts] == ["train-00", "train-00"]
    assert "test-00000-of-00001.csv, validation-00000-of-00001.csv (held-out rows" in said(tmp_path)
    assert {name[:4] for name in read(tmp_path, "classification", held_out=True).texts} == {"vali", "test"}
    assert len(read(tmp_path / "test-00000-of-00001.csv", "classification")) == 1
    for file in tmp_path.glob("train*"):
        file.unlink()
    assert "name the file" in refusal(tmp_path)


@pytest.mark.parametrize(("names", "taken"), [
    (("blood_test", "hiv-test", "latest"), ("blood_test", "hiv-test", "latest")),
    (("sst2_train", "sst2_test", "blood_test"), ("blood_test", "sst2_train")),
    (("notes", "dev", "Test_2"), ("notes",)), (("eval",), ())])
def test_a_file_is_held_out_by_its_whole_name_or_beside_its_training_part(tmp_path, names, taken):
    for name in names:
        write(tmp_path / f"{name}.csv", ["text", "label"], [(name, 1)])
    if taken:
        assert read(tmp_path, "classification").texts == taken
    else:
        refusal(tmp_path)


def test_a_folder_without_held_out_files_is_evaluated_on_whole(tmp_path):
    write(tmp_path / "train.csv", ["text", "label"], [("x", 1)])
    assert read(tmp_path, "classification", held_out=True).texts == ("x",)


def test_the_same_bytes_are_read_once_and_the_same_rows_are_said(tmp_path, said):
    rows = [(f"note {i}", i % 2) for i in range(5)]
    content = write(tmp_path / "notes.csv", ["text", "label"], rows).read_bytes()
    (tmp_path / "notes (1).csv").write_bytes(content)
    os.link(tmp_path / "notes.csv", tmp_path / "notes-hard.csv")
    (tmp_path / "notes-link.csv").symlink_to("notes.csv")
    read_rows = read(tmp_path, "classification")
    assert len(read_rows) == 5 and read_rows.files == (str(tmp_path / "notes.csv"),)
    assert "notes (1).csv, notes-hard.csv, notes-link.csv (the same bytes as notes.csv" in said(tmp_path)
    write(tmp_path / "rows.parquet", ["text", "label"], rows[:3])
    assert "3 rows have the same text in both files" in said(tmp_path)


def test_rows_that_several_pairs_of_files_share_are_one_warning_with_the_worst_pair_first(tmp_path, said):
    notes = [(f"note {i}", i % 2) for i in range(5)]
    write(tmp_path / "a.csv", ["text", "label"], notes)
    write(tmp_path / "b.csv", ["text", "label"], [notes[0], ("b", 1)])
    write(tmp_path / "c.csv", ["text", "label"], [*notes[1:4], ("c", 1)])
    read(tmp_path, "classification")
    warning = said(tmp_path).replace(f"{tmp_path}/", "")
    assert "c.csv and a.csv (3), b.csv and a.csv (1): 4 rows have the same text in both files" in warning


def test_links_to_nowhere_pipes_and_sockets_are_refused_and_nothing_waits(tmp_path, monkeypatch):
    write(tmp_path / "a.csv", ["text", "label"], [("x", 1)])
    (tmp_path / "b.csv").symlink_to("/mnt/no/such/share/b.csv")
    (tmp_path / "c.csv").symlink_to("c.csv")
    os.mkfifo(tmp_path / "d.csv")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("e.csv")
        message = refusal(tmp_path)
    assert "is a link to /mnt/no/such/share/b.csv, which does not exist. Mount the share" in message
    assert "c.csv: the file is a link that cannot be followed" in message
    assert "d.csv: this is a named pipe" in message and "e.csv: this is a socket" in message
    for name in "bcde":
        assert f"{name}.csv" in refusal(tmp_path / f"{name}.csv")


def test_what_lies_beside_data_is_said_with_its_remedy(tmp_path, said):
    write(tmp_path / "a.csv", ["text", "label"], [("x", 1)])
    for name in ("._a.csv", "~$a.csv", "a.xlsx", "a.zip", "a.json", "README.txt", ".DS_Store"):
        (tmp_path / name).write_text(SECRET)
    (tmp_path / "share").symlink_to("/mnt/no/such/share")
    (tmp_path / "sub.csv").mkdir()
    (tmp_path / "sub.csv" / "part-0.csv").write_text("text,label\n")
    message = said(tmp_path)
    for told in ("._a.csv (hidden", "~$a.csv (the lock", "a.xlsx (a workbook", "a.zip (packed", "a.json (not .jsonl",
                 "README.txt", "share (a broken link", "sub.csv/ (folders are not searched"):
        assert told in message
    assert ".DS_Store" not in message


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_what_may_not_be_read_is_said(tmp_path, said):
    write(tmp_path / "a.csv", ["text", "label"], [("x", 1)])
    (tmp_path / "sub").mkdir(mode=0)
    assert "sub/ (cannot be searched" in said(tmp_path)
    (tmp_path / "a.csv").chmod(0)
    assert "Permission denied" in refusal(tmp_path)


def test_a_file_that_goes_while_others_are_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.csv", ["text", "label"], [("x", 1)])
    gone = write(tmp_path / "b.csv", ["text", "label"], [("y", 1)])
    looked = Path.open

    def opened(self, *arguments, **options):
        if self.name == "a.csv":
            gone.unlink(missing_ok=True)
        return looked(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert f"{gone}: the file cannot be read: No such file or directory" in refusal(tmp_path)


def test_names_are_shown_without_what_moves_a_terminal(tmp_path):
    path = tmp_path / "a\n\x1b[31mb.csv"
    path.write_text("text,label\n,1\n")
    assert "a\\n\\x1b[31mb.csv:2" in refusal(path) and "\x1b" not in refusal(tmp_path)
    path.rename(other := Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv")))
    assert refusal(other).encode()


@pytest.mark.parametrize(("path", "told"), [
    ("~nobody-here/notes.csv", "home directory"), ("/tmp/" + "x" * 5000, "cannot be looked up"),
    ("a\0b.csv", "a\\x00b.csv does not exist")])
def test_a_path_that_cannot_be_is_an_error(path, told):
    assert told in refusal(path) and len(refusal(path)) < 400


def test_a_file_whose_name_begins_with_a_tilde_is_no_home_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~notes.csv", ["report", "class"], [("warm", "yes"), ("dull", "no")])
    assert "--column text=report" in refusal(".")


# --- Units ---

def test_ids_that_lost_their_leading_zeros_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "label": [1], "pid": [7]}), tmp_path / "a.parquet")
    write(tmp_path / "b.csv", ["text", "label", "pid"], [("y", 1, "007"), ("z", 1, "8")])
    message = refusal(tmp_path, unit="pid")
    where = f"{tmp_path / 'b.csv'}:2 (see {tmp_path / 'a.parquet'}:row 1)"
    assert f"{where}: two ids differ only in leading zeros" in message
    path = write(tmp_path / "b.csv", ["text", "label", "pid"], [("y", 1, "A-007"), ("z", 1, "A-7")])
    assert read(path, "classification", unit="pid").units == ("A-007", "A-7")


def test_ids_in_other_capitals_are_said_and_rounded_ones_refused(tmp_path, said):
    path = write(tmp_path / "a.csv", ["text", "label", "pid"], [("x", 1, "P1"), ("y", 1, "p1"), ("z", 1, "P2")])
    assert f"{path}:3 (see {path}:2): two ids differ only in capitals" in said(path, unit="pid")
    path = write(tmp_path / "a.csv", ["text", "label", "pid"], [("x", 1, "1.23457E+11"), ("y", 1, "1e5")])
    assert f"{path}:2: the id is a number that a spreadsheet has rounded" in refusal(path, unit="pid")


# --- Conversations ---

TURNS = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_conversation_may_be_written_as_json_in_any_format(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["messages"], [(json.dumps(TURNS),)])
    assert read(path, "causal-lm").messages == ((("user", "ask"), ("assistant", "say")),)
    path = write(tmp_path / f"b{suffix}", ["messages"], [(str(TURNS).replace("ask", SECRET),)])
    assert "json.dumps" in refusal(path, "causal-lm")


@pytest.mark.parametrize("role", ["human", "User", " user", "USER"])
def test_a_role_that_is_written_otherwise_is_refused_with_the_right_one(tmp_path, role):
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": SECRET}, TURNS[1]]})
    assert 'Write "role": "user"' in refusal(path, "causal-lm")


def test_a_role_of_a_template_s_own_is_left_to_it(tmp_path):
    turns = [{"role": "ipython", "content": "x"}, TURNS[1]]
    assert read(write_lines(tmp_path / "a.jsonl", {"messages": turns}), "causal-lm").messages[0][0][0] == "ipython"


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"prompt": "a", "completion": "b"}])
def test_rows_of_another_task_say_which(tmp_path, row):
    assert "add --task causal-lm" in refusal(write_lines(tmp_path / "a.jsonl", row))


# --- What spreadsheets leave around a table ---

@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_empty_rows_and_empty_columns_without_a_name_are_left_out_and_said(tmp_path, suffix, said):
    path = tmp_path / f"a{suffix}"
    content = ",text,label,,\n1,x,1,,\n2,y,0\n,,,,\n3,z,1,,,,,\n,,,\n"
    path.write_text(content if suffix == ".csv" else content.replace(",", "\t"))
    message = said(path)
    rows = read(path, "classification")
    assert rows.texts == ("x", "y", "z") and [rows.where(i) for i in range(3)] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert f"{path}:1: the first column has no name" in message
    assert f"{path}:4, {path}:6: the row is empty. It is left out" in message


@pytest.mark.parametrize(("row", "said_"), [
    (f"x,1,,{SECRET}", "a field stands in a column that has no name"), (f"x,{SECRET},1", "has no name"),
    (f"x,1,,,,{SECRET}", "(6 fields): the row has more or fewer fields than the header, which has 2"),
    ("x", "(1 fields): the row has more or fewer fields")])
def test_what_stands_beside_the_named_columns_is_refused(tmp_path, row, said_):
    path = write_lines(tmp_path / "a.csv", "text,label,,", "a,0,,", row, "b,1,,")
    assert f"{path}:3" in refusal(path) and said_ in refusal(path)


def test_a_column_without_a_name_between_others_must_be_empty(tmp_path):
    path = write_lines(tmp_path / "a.csv", "text,,label", "x,,1", f"y,{SECRET},0")
    assert f"{path}:3: a field stands in a column that has no name" in refusal(path)
    assert "the first row names no column" in refusal(write_lines(tmp_path / "b.csv", " , ", "x,1"))


@pytest.mark.parametrize("line", [
    "Total,,", "Total,2,", ",Summe,2", "Gesamt:,,2", "n = 2,,", "N=1.234,,", "Anzahl: 2,,", "Zwischensumme,,2",
    "Grand total,2,3", "total 2 records,,", "(2 rows)", "(2 rows affected)", "2 rows selected.", 'Mittelwert,,"0,5"',
    "TOTAL,50 %,50 %"])
def test_a_line_of_totals_at_the_end_becomes_no_record(tmp_path, line):
    path = write_lines(tmp_path / "a.csv", "text,label,id", "x,1,1", "y,0,2", line, ",,")
    assert f"{path}:4: the row at the end is a line of totals" in refusal(path)
    assert "line of totals" in refusal(path, unit="id")


@pytest.mark.parametrize("line", [
    "Total knee replacement,1,2", "total,yes,2", "in total 2 falls,1,2", "5,1,2", "summer,0,1"])
def test_a_record_that_begins_like_totals_is_one(tmp_path, line):
    path = write_lines(tmp_path / "a.csv", "text,label,id", "x,1,1", line)
    assert len(read(path, "classification")) == 2


def test_a_row_like_totals_between_others_is_read_and_said(tmp_path, said):
    path = write_lines(tmp_path / "a.csv", "text,label", "x,1", "total,0", "sum,1", "y,0")
    assert read(path, "classification").texts == ("x", "total", "sum", "y")
    assert f"{path}:3, {path}:4: the row looks like a line of totals, and is read as a record" in said(path)
