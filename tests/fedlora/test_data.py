"""Reading of data files: every format gives the same rows, and a bad row is named by file and line, never quoted."""

from __future__ import annotations

import datetime
import json
import logging
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.data import in_order, label_names, labelled_by, normalize_label
from fedlora.tasks import read
from tests.fedlora.data_files import SECRET, refusal, write, write_lines

NOTES = [("chest pain,\tsweating", 1), (f'{SECRET} said "no"\nand left', 0), ("line\u2028separator and ünïcode", 1)]
LINES = [(text.replace("\t", " ").replace("\n", " "), label) for text, label in NOTES]
"""Texts that a TSV file can hold."""


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    notes = LINES if suffix == ".tsv" else NOTES
    rows = read(write(tmp_path / f"a{suffix}", ["text", "label"], notes), "classification")
    assert rows.texts == tuple(text for text, _ in notes)
    assert rows.labels == ("1", "0", "1")
    assert (rows.kind, rows.seconds, rows.messages, len(rows)) == ("text", None, None, 3)


def test_a_row_knows_the_line_on_which_it_begins(tmp_path):
    text = tmp_path / "a.csv"
    text.write_bytes(b'label,text\r\n1,one\r\n0,"two\r\nlines"\r\n\r\n1,after\r\n')
    rows = read(text, "classification")
    assert [rows.where(i) for i in range(3)] == [f"{text}:2", f"{text}:3", f"{text}:6"]

    blank = write_lines(tmp_path / "b.jsonl", "", {"text": "one", "label": 0}, "", {"text": "two", "label": 0})
    assert read(blank, "classification").where(1) == f"{blank}:4"

    table = write(tmp_path / "c.parquet", ["text", "label"], NOTES)
    assert read(table, "classification").where(2) == f"{table}:row 3"


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.csv", ["text", "label"], NOTES[:1])
    write(tmp_path / "a.jsonl", ["text", "label"], NOTES[1:])
    write_lines(tmp_path / ".c.jsonl", "hidden")
    write_lines(tmp_path / "README.md", "not data")
    rows = read(tmp_path, "classification")
    assert rows.texts == (NOTES[1][0], NOTES[2][0], NOTES[0][0])
    assert rows.files == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv"))
    assert [part.tolist() for part in rows.by_file()] == [[0, 1], [2]]
    assert rows.take([2, 0]).where(0) == f"{tmp_path / 'b.csv'}:2"
    assert rows.take([2, 0]).labels == ("1", "0")


@pytest.mark.parametrize("names", [("text_a", "text_b"), ("sentence1", "sentence2")])
def test_two_text_columns_make_a_pair(tmp_path, names):
    rows = read(write(tmp_path / "a.jsonl", [*names, "label"], [("p", "h", "yes"), ("q", "k", "no")]), "classification")
    assert (rows.kind, rows.texts, rows.seconds) == ("pair", ("p", "q"), ("h", "k"))
    assert label_names(rows) == ("no", "yes")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_second_column_that_is_empty_throughout_is_no_pair(tmp_path, suffix):
    columns = ["sentence1", "sentence2", "label"]
    rows = read(write(tmp_path / f"a{suffix}", columns, [("p", None, 1), ("q", None, 0)]), "classification")
    assert (rows.kind, rows.seconds) == ("text", None)
    mixed = write(tmp_path / f"b{suffix}", columns, [("p", "h", 1), ("q", None, 0)])
    assert "sentence2 is empty" in refusal(mixed)


@pytest.mark.parametrize(("value", "name"), [
    (0, "0"), ("0", "0"), (0.0, "0"), ("1.0", "1"), (" 1 ", "1"), (-1, "-1"), ("urgent", "urgent"),
    (" routine", "routine"), ("v1.0", "v1.0"), (None, None), ("", None), (float("nan"), None)])
def test_labels_are_normalised(value, name):
    assert normalize_label(value) == name


@pytest.mark.parametrize("value", [0.5, ["a"], {"a": 1}])
def test_a_label_that_is_neither_number_nor_name_is_refused(tmp_path, value):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x", "label": 1}, {"text": SECRET, "label": value})
    assert f"{path}:2" in refusal(path)


def test_a_missing_label_is_none(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x", "label": "a"}, {"text": "y", "label": None}, {"text": "z"})
    assert read(path, "classification").labels == ("a", None, None)
    assert label_names(read(path, "classification")) == ("a",)


def test_what_a_row_may_lack_the_first_may_lack_too_but_not_all_of_a_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y", "label": "a"})
    assert read(path, "classification").labels == (None, "a")
    assert "no column label" in refusal(write_lines(tmp_path / "b.jsonl", {"text": "x"}, {"text": SECRET}))
    path = write_lines(tmp_path / "c.jsonl", {"text_a": "x", "label": "a"}, {"text_a": "y", "text_b": "z"})
    assert f"{path}:1: text_b is empty" in refusal(path)
    assert "text_a + text_b" in refusal(write_lines(tmp_path / "d.jsonl", {"text_a": "x", "label": "a"}))


def test_columns_can_be_renamed(tmp_path):
    path = write(tmp_path / "a.csv", ["note", "urgent", "text"], [("x", 1, "other")])
    rows = read(path, "classification", columns={"text": "note", "label": "urgent"})
    assert (rows.texts, rows.labels) == (("x",), ("1",))
    assert "--column txt=" in refusal(path, columns={"txt": "note"})
    assert "its columns are: note, urgent, text" in refusal(path, columns={"text": "nowhere"})


def test_a_missing_column_lists_those_present(tmp_path):
    path = write(tmp_path / "a.jsonl", ["note", "label"], [(SECRET, 1)])
    message = refusal(path)
    assert "its columns are: note, label" in message and "--column text=NAME" in message and f"{path}:1" in message
    path = write(tmp_path / "b.csv", ["text", "class"], [(SECRET, 1)])
    assert "no column label" in refusal(path) and "its columns are: text, class" in refusal(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("first", [(f"{SECRET} has had chest pain since noon", "1"), (f"{SECRET} has HIV", "positive"),
                                   (SECRET,), (f"{SECRET} has had pain since noon, without relief", "label")])
def test_a_file_without_header_is_not_quoted_as_one(tmp_path, suffix, first):
    path = write(tmp_path / f"a{suffix}", list(first), [("another", "0")[:len(first)]])
    for message in (refusal(path), refusal(path, "causal-lm"), refusal(path, columns={"text": "note"}, unit="patient")):
        assert "add" in message and "header line" in message and "has HIV" not in message and f"{path}:1" in message


def test_a_header_with_one_usual_or_mapped_name_is_listed_in_any_capitals(tmp_path):
    assert "its columns are: Text, Klass" in refusal(write(tmp_path / "a.csv", ["Text", "Klass"], [("x", 1)]))
    path = write(tmp_path / "b.tsv", ["note", "klass"], [("x", 1)])
    assert "its columns are: note, klass" in refusal(path) and "--column text=note,label=klass" in refusal(path)
    assert "its columns are: note, klass" in refusal(path, columns={"text": "note"})
    assert "its columns are: note, klass" in refusal(path, columns={"text": "note", "label": "klass"}, unit="patient")
    path = write(tmp_path / "c.csv", ["patient", "note"], [("p", "x")])
    assert "its columns are: patient, note" in refusal(path, unit="patient")


def test_causal_rows_are_texts_completions_or_conversations(tmp_path):
    assert read(write(tmp_path / "t.csv", ["text"], [("x",)]), "causal-lm").kind == "text"
    rows = read(write(tmp_path / "p.csv", ["prompt", "completion", "text"], [("p", "c", "t")]), "causal-lm")
    assert (rows.kind, rows.texts, rows.seconds, rows.labels) == ("completion", ("p",), ("c",), None)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for suffix in (".jsonl", ".parquet"):
        rows = read(write(tmp_path / f"m{suffix}", ["messages"], [(turns,)]), "causal-lm")
        assert rows.messages == ((("user", "q"), ("assistant", "a")),)


@pytest.mark.parametrize("turns", [
    SECRET, [], [SECRET], [{"content": SECRET}], [{"role": "user", "content": SECRET}],
    [{"role": "user", "content": SECRET}, {"role": "assistant", "content": None}],
    [{"role": "user", "content": SECRET}, {"role": "assistant", "content": 3}]])
def test_a_conversation_needs_roles_contents_and_an_answer(tmp_path, turns):
    path = write_lines(tmp_path / "a.jsonl", {"messages": turns})
    assert f"{path}:1" in refusal(path, "causal-lm")


@pytest.mark.parametrize(("line", "said"), [
    (f'{{"text": "{SECRET}", "label": 1', "is not valid JSON"),
    (f'{{"text": "{SECRET}\t", "label": 1}}', "is not valid JSON"),
    (f'["{SECRET}"]', "not an object"),
    (f'"{SECRET}"', "not an object"),
    ('{"a":' * 100_000, "JSON"),
    ('{"text": "x", "label": ' + "9" * 5000 + "}", "JSON"),
    (f'{{"text": 3, "label": 1, "x": "{SECRET}"}}', "of type int"),
    (f'{{"text": null, "label": 1, "x": "{SECRET}"}}', "missing or empty"),
    (f'{{"label": 1, "x": "{SECRET}"}}', "missing or empty"),
    (f'{{"text": " ", "label": 1, "x": "{SECRET}"}}', "is empty"),
    (f'{{"text": "{SECRET} \\ud83d", "label": 1}}', "text holds half of a Unicode surrogate"),
    (f'{{"text": "{SECRET}", "label": "\\ud83d"}}', "the label holds half of a Unicode surrogate"),
    (f'{{"text": "{SECRET}", "label": 1}}\r{{"text": "{SECRET}", "label": 1}}', "carriage return"),
    (f"{SECRET}\0", "zero byte")])
def test_a_bad_jsonl_line_is_named_and_not_quoted(tmp_path, line, said):
    path = write_lines(tmp_path / "a.jsonl", {"text": "fine", "label": 1}, line, {"text": "fine", "label": 1})
    assert said in refusal(path) and f"{path}:2" in refusal(path)


def test_a_json_array_is_told_how_to_become_lines(tmp_path):
    assert "one object per line" in refusal(write_lines(tmp_path / "a.jsonl", "[", '{"text": "x"}', "]"))


@pytest.mark.parametrize(("body", "line", "said"), [
    ('text,label\nx,1\n"open,1\ny,0\n', 3, "not closed"),
    ('text,label\nx,1\n"a"b,1\n', 3, "not doubled"),
    ("text,label\nx,1\na,b,1\n", 3, "(3 fields): the row has more or fewer fields than the header, which has 2"),
    ("text,label\nx,1\nonly\n", 3, "(1 fields): the row has more or fewer fields than the header, which has 2"),
    ("text,text\nx,1\n", 1, "name every column once"),
    ("text,label\nx,1\n,1\n", 3, "missing or empty"),
    ('text,label\n"x\ny",1\n   ,1\n', 4, "is empty")])
def test_a_bad_csv_row_is_named(tmp_path, body, line, said):
    path = tmp_path / "a.csv"
    path.write_text(body)
    assert said in refusal(path) and f"{path}:{line}" in refusal(path)


@pytest.mark.parametrize(("body", "texts"), [
    ('"quoted start\t1\nsecond row ends"\t0\nthird\t1\n', ('"quoted start', 'second row ends"', "third")),
    ('"said ""no"""\t1\r\nsaid "no"\t1\r\n5" wound\t0\r\n', ('said "no"', 'said "no"', '5" wound')),
    ('"a" and "b"\t1\n"a""\t1\n"\t0\n', ('"a" and "b"', '"a""', '"'))])
def test_a_line_of_tsv_is_a_row_whatever_its_quotation_marks(tmp_path, body, texts):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"text\tlabel\n" + body.encode())
    rows = read(path, "classification")
    assert rows.texts == texts and [rows.where(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 3, 4)]


@pytest.mark.parametrize(("columns", "row", "line"), [
    (["text", "label"], (f"{SECRET}\tx", 1), 3), (["text", "label"], (f"{SECRET}\nx", 1), 3),
    (["label", "text"], (1, f"{SECRET}\nx"), 4), (["text"], (f"{SECRET}\tx",), 3), (["text"], (f"{SECRET}\nx",), 3)])
def test_a_quoted_tsv_field_with_a_tab_or_a_line_break_is_refused(tmp_path, columns, row, line):
    path = write(tmp_path / "a.tsv", columns, [(1,) * len(columns), row])
    message = refusal(path, "classification" if len(columns) > 1 else "causal-lm")
    assert f"{path}:{line}" in message and "Replace them with blanks, or write the file as .jsonl or .csv" in message


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(("ends", "line"), [("\r\r", 1), ("\n\r", 2)])
def test_lines_that_end_in_a_carriage_return_alone_are_said_to(tmp_path, suffix, ends, line):
    path = tmp_path / f"a{suffix}"
    first, second = ends
    path.write_bytes(f"text,label{first}{SECRET},1{second}other,0\n".replace(",", "," if suffix == ".csv" else "\t")
                     .encode())
    message = refusal(path)
    assert f"{path}:{line}: the line holds a carriage return" in message and f"tr '\\r' '\\n' < a{suffix}" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_line_that_is_not_utf8_among_others_is_named_by_line_and_byte(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("ü", 1), ("y", 0)])
    if suffix == ".jsonl":
        path.write_text(path.read_text().replace("\\u00fc", "ü"), "utf-8")
    path.write_bytes(path.read_bytes().replace(b"y", b"\xfc"))
    place = "2 (byte 11)" if suffix == ".jsonl" else "3 (byte 1)"
    assert f"{path}:{place}: the line is not UTF-8" in refusal(path) and "save all of it as UTF-8" in refusal(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_mark_is_dropped_and_tells_the_encoding(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], LINES)
    content = path.read_bytes().decode("utf-8")
    for encoding in ("utf-8-sig", "utf-16", "utf-32", "utf-16-le"):  # the last is known by its zero bytes
        path.write_bytes(content.encode(encoding))
        assert read(path, "classification").texts == tuple(text for text, _ in LINES)
    path.write_bytes(content.encode()[:-3] + b"\0" + content.encode()[-3:])
    assert "the line holds a zero byte" in refusal(path)


def test_damaged_parquet_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    assert "damaged or not parquet" in refusal(path)
    pq.write_table(pa.table({"text": [b"bytes"], "label": [1]}), path)
    assert "of type bytes" in refusal(path) and f"{path}:row 1" in refusal(path)


def test_of_a_parquet_file_only_the_needed_columns_are_read(tmp_path):
    # a date beyond the year 9999, which Python cannot represent
    path, far = tmp_path / "a.parquet", pa.array([2**31 - 1, 0], pa.date32())
    pq.write_table(pa.table({"note": ["x", "y"], "label": [1, 0], "seen": far, "patient": ["p", "q"]}), path)
    rows = read(path, "classification", columns={"text": "note"}, unit="patient")
    assert (rows.texts, rows.labels, rows.units) == (("x", "y"), ("1", "0"), ("p", "q"))
    assert "its columns are: note, label, seen, patient" in refusal(path)
    message = refusal(path, columns={"text": "note"}, unit="seen")
    assert f"{path}:row 1: this row or one after it" in message and "columns note, label, seen. Write it as" in message
    pq.write_table(pa.table({"label": [datetime.date(2020, 1, 1)], "text": ["x"]}), path)
    assert "the label is of type date" in refusal(path)


def test_a_folder_says_what_of_it_is_not_read(tmp_path, caplog):
    write(tmp_path / "a.csv", ["text", "label"], NOTES)
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "state" / "deep").mkdir(parents=True)
    (tmp_path / "state" / "deep" / "x.json").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path, "classification")) == 3
    assert not caplog.messages

    (tmp_path / "sub" / "deep").mkdir(parents=True)
    write(tmp_path / "sub" / "deep" / "z.csv", ["text", "label"], NOTES)
    (tmp_path / "b.json").write_text(SECRET)
    with caplog.at_level(logging.WARNING):
        read(tmp_path, "classification")
    assert "left out: sub/ (folders are not searched" in caplog.messages[-1] and "; b.json (" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("Only files that end in .jsonl, .csv, .tsv (each also with .gz), .parquet, "
                                        ".xlsx and lie in the folder itself are read")
    for name in ("c.jsonl.xz", "d.txt", "e.txt", "f.txt", "g.txt"):
        (tmp_path / name).write_text(SECRET)
    with caplog.at_level(logging.WARNING):
        read(tmp_path, "classification")
    assert "left out: d.txt, e.txt, f.txt and 1 more; sub/" in caplog.messages[-1] and len(caplog.messages) == 2
    assert "c.jsonl.xz (packed: unpack it)" in caplog.messages[-1]


def test_paths_that_hold_nothing_say_what_is_accepted(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert ("which must end in .jsonl, .csv, .tsv (each also with .gz), .parquet, .xlsx: left out are notes.txt"
            in refusal(tmp_path))
    assert "if it is a table, name it .csv" in refusal(tmp_path / "notes.txt")
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("./here/nowhere")
    assert "does not exist" in refusal("tests/nowhere.csv")
    for empty in ("", "\n\n"):
        (tmp_path / "e.jsonl").write_text(empty)
        assert "holds no rows" in refusal(tmp_path / "e.jsonl")
    (tmp_path / "e.csv").write_text("text,label\n")
    assert "holds no rows" in refusal(tmp_path / "e.csv")


def test_files_of_one_folder_have_the_same_columns(tmp_path):
    write(tmp_path / "a.csv", ["text", "label"], [("x", 1)])
    write(tmp_path / "b.csv", ["text_a", "text_b", "label"], [("x", "y", 1)])
    assert "same columns in all files" in refusal(tmp_path)


def test_a_mistyped_local_path_is_not_sent_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert "does not exist" in refusal("data/hospital")


def test_the_hub_is_asked_only_where_that_is_allowed_and_one_that_cannot_be_reached_is_an_error(monkeypatch):
    import datasets

    asked = []

    def unreachable(*_, **__):
        asked.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError

    assert "add --allow-download" in refusal("nobody-here/no-such-dataset")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert "add --allow-download" in refusal("nobody-here/no-such-dataset")
    assert "the hub did not give a dataset" in refusal("nobody-here/no-such-dataset", allow_download=True)
    assert asked == [True, False] and not datasets.config.HF_HUB_OFFLINE


def test_where_the_package_that_reads_the_hub_is_not_installed_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'datasets>=3.0'" in refusal("nobody-here/no-such-dataset", allow_download=True)


def test_a_hub_datasets_classes_have_their_names_and_minus_1_is_missing(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"]),
                                  "stars": datasets.Value("int64")})
    hub = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, -1, 1], "stars": [-1, 0, 1]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    rows = read("org/name", "classification")
    assert rows.labels == ("bad", None, "good") and labelled_by(rows, ("0", "1")).labels == ("0", None, "1")
    assert read("org/name", "classification", columns={"label": "stars"}).labels == ("-1", "0", "1")


@pytest.mark.parametrize(("labels", "ordered"), [
    (["10", "9", "0", "-1"], ("-1", "0", "9", "10")), (["10", "9", "b"], ("10", "9", "b")), ([], ())])
def test_whole_numbers_are_ordered_by_value_and_names_by_name(labels, ordered):
    assert in_order(labels) == ordered


@pytest.mark.parametrize(("task", "columns", "kind"), [
    ("classification", {"text_a": "one", "text_b": "two"}, "pair"), ("classification", {"text": "one"}, "text"),
    ("classification", {"label": "label"}, "text"), ("causal-lm", {"text": "one"}, "text"),
    ("causal-lm", {"prompt": "one", "completion": "two"}, "completion")])
def test_columns_that_are_named_are_those_that_are_read(tmp_path, task, columns, kind):
    """Named columns are read even if the file has columns with the usual names too."""
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    row = {"text": "id-1", "messages": turns, "one": "first", "two": "second", "label": 1}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found = read(file, task, columns=columns)
    assert found.kind == kind and found.texts == (("id-1",) if columns.keys() == {"label"} else ("first",))


def test_columns_of_two_layouts_fit_none(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"one": "a", "two": "b", "label": 1}\n')
    with pytest.raises(ValueError, match="needs the columns"):
        read(file, "classification", columns={"text": "one", "text_b": "two"})
