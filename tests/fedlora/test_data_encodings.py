"""Encodings, separators and packing of text files: found and said, named by an option, or refused."""

from __future__ import annotations

import csv
import gzip
import io
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import ClientConfig, read_config
from fedlora.data import ReadOptions, packing
from fedlora.data.encoding import LONGEST
from fedlora.tasks import read
from tests.fedlora.data_files import SECRET, refusal, write_lines

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
WORDS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_categories=["Cc", "Cf"],
                              exclude_characters=map(chr, range(0xA0, 0xC0))),  # in Latin-1, nothing is UTF-8 then
                min_size=3, max_size=20).filter(lambda text: text.strip() and any("a" <= one <= "z" for one in text))


@settings(deadline=None, max_examples=60)  # the first example imports what reads the file
@given(st.lists(st.tuples(WORDS, st.sampled_from(["ja", "nein"])), min_size=1, max_size=6),
       st.sampled_from([*SEPARATORS]),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]),
       st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_a_table_reads_back_equal_in_every_encoding_and_separator(
        tmp_path_factory, rows, separator, encoding, end, packed, say):
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=end).writerows([("id", "text", "label"), *(
        (i, *row) for i, row in enumerate(rows))])
    content = out.getvalue().encode(encoding)
    path = tmp_path_factory.mktemp("table") / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    said = ReadOptions(delimiter=separator, encoding=encoding.removesuffix("-sig")) if say else None
    try:
        found = read(path, "classification", options=said)
    except ValueError as refused:  # nothing is guessed: what may be another encoding must be named
        assert not say and encoding in ("cp1252", "latin-1") and "--encoding" in str(refused)
        found = read(path, "classification", options=ReadOptions(encoding=encoding))
    assert (found.texts, found.labels) == tuple(zip(*rows, strict=True))


def test_bytes_that_are_valid_utf8_are_utf8_and_an_option_that_says_otherwise_is_followed_and_said(tmp_path, caplog):
    path = write_lines(tmp_path / "a.csv", "text,label", "schön,1")
    assert read(path, "classification").texts == ("schön",) and not caplog.messages
    assert read(path, "classification", options=ReadOptions(encoding="cp1252")).texts == ("schÃ¶n",)
    assert "read as Windows-1252 (cp1252) text, although it is valid UTF-8" in caplog.messages[-1]


def test_a_mark_that_contradicts_the_option_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nx,1\n".encode("utf-16"))
    assert "begins with the mark of UTF-16, and --encoding is cp1252" in refusal(
        path, options=ReadOptions(encoding="cp1252"))
    assert read(path, "classification", options=ReadOptions(encoding="utf-16")).texts == ("x",)


def test_a_line_outside_of_the_named_encoding_is_refused_by_its_place(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nx,1\n\x81y,0\n")
    for encoding, name in (("cp1252", "Windows-1252 (cp1252)"), ("utf-8", "UTF-8")):
        assert f"{path}:3 (byte 1): the line is not {name}. Correct --encoding" in refusal(
            path, options=ReadOptions(encoding=encoding))


@pytest.mark.parametrize(("encoding", "text"), [
    ("cp850", "Müdigkeit"), ("mac-roman", "für"), ("cp1251", "Привет"), ("cp1253", "πόνος"),
    ("shift-jis", "頭痛がする"), ("gb18030", "头痛发热")])
def test_what_is_hardly_windows_text_is_refused_with_the_option_that_reads_it(tmp_path, encoding, text):
    path = tmp_path / "a.csv"
    path.write_bytes(f"text,label\nx,1\n{text},0\n".encode(encoding))
    assert f"{path}:3: the line is not UTF-8, and does not look like Windows-1252 text" in refusal(path)
    assert read(path, "classification", options=ReadOptions(encoding=encoding)).texts == ("x", text)


def test_lines_of_utf16_are_cut_at_line_feeds_alone_and_bounded(tmp_path):
    path = tmp_path / "a.csv"
    texts = ["Āਊ", "ਊĊ", "x" * 70_000]  # characters whose bytes are those of line feeds, at even and odd places
    path.write_bytes(b"\xfe\xff" + "".join(["text,label\n", *(f"{text},1\n" for text in texts)]).encode("utf-16-be"))
    assert read(path, "classification").texts == tuple(texts)
    path.write_bytes(("text,label\nx,1\n" + "y" * (LONGEST // 2 + 8)).encode("utf-16"))
    assert f"{path}:3: the line is longer than 16 MiB" in refusal(path)


@pytest.mark.parametrize(("given", "name"), [("UTF8", "utf-8"), ("utf_8_sig", "utf-8"), ("windows-1252", "cp1252"),
                                             ("UTF-16", "utf-16"), ("latin1", "iso8859-1"), ("macintosh", "mac-roman")])
def test_an_encoding_is_known_by_all_of_its_names(given, name):
    assert read_config(ClientConfig, [f"--encoding={given}"]).encoding == name


@pytest.mark.parametrize("given", ["utf-9", "base64", "rot13", "cp037", "utf-7", "idna", "unicode_escape"])
def test_what_is_no_encoding_of_text_files_is_refused_with_some_that_are(given, capsys):
    with pytest.raises(SystemExit):
        read_config(ClientConfig, [f"--encoding={given}"])
    assert "is no encoding of text files; give utf-8, utf-16, cp1252" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "character"), [*((word, one) for one, word in SEPARATORS.items()), (";", ";"),
                                                  ("\\t", "\t"), ("\t", "\t"), ("^", "^")])
def test_a_separator_is_named_by_a_word_or_itself(given, character):
    assert read_config(ClientConfig, [f"--delimiter={given}"]).delimiter == character


@pytest.mark.parametrize("given", ["colon", ";;", "a", '"', " ", ""])
def test_what_cannot_separate_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        read_config(ClientConfig, [f"--delimiter={given}"])
    assert "cannot separate fields; give comma, semicolon, tab, bar" in capsys.readouterr().err


@pytest.mark.parametrize(("header", "said"), [
    ("text;label", "semicolons"), ('"text";"label"', "semicolons"), ("text\tlabel", "tabs"),
    ("text|label", "vertical bars"), ('"note; or what";text;label', "semicolons"),
    ('"note\nand more";text;label', "semicolons"),
    ("a,b;text;label", "semicolons"), ("text;label;a,b", "semicolons")])
def test_a_separator_is_found_outside_of_quotation_marks_and_by_the_needed_columns(tmp_path, caplog, header, said):
    path = tmp_path / "a.csv"
    separator = {"semicolons": ";", "tabs": "\t", "vertical bars": "|"}[said]
    first = next(csv.reader([header.replace("\n", " ")], delimiter=separator))
    row = {"text": f"{SECRET}, she said", "label": "1"}
    with path.open("w", newline="") as stream:
        stream.write(f"{header}\r\n")
        csv.writer(stream, delimiter=separator).writerow([row.get(name, "") for name in first])
    with caplog.at_level(logging.WARNING):
        assert read(path, "classification").texts == (f"{SECRET}, she said",)
    assert f"{path}: read with {said} between the fields. If that is wrong, add --delimiter" in caplog.text
    assert SECRET not in caplog.text


def test_a_first_line_that_two_separators_fit_is_refused_until_one_is_named(tmp_path):
    path = write_lines(tmp_path / "a.csv", "text,more;label", "x,1;y")
    assert f"{path}:1: the first line can be read with commas or semicolons" in refusal(path)
    rows = read(path, "classification", columns={"text": "text,more"}, options=ReadOptions(delimiter=";"))
    assert (rows.texts, rows.labels) == (("x,1",), ("y",))


def test_rows_between_semicolons_that_a_quotation_mark_joined_are_said(tmp_path, caplog):
    path = write_lines(tmp_path / "a.csv", "text;label", '"so it goes;1', "fine;0", 'she said ";1')
    with caplog.at_level(logging.WARNING):
        read(path, "classification")
    assert f"{path}:2: a quoted field has lines that look like rows" in caplog.text


# --- Packed files ---

CONTENT = b"text,label\nx,1\ny,0\n"


@pytest.mark.parametrize(("suffix", "content"), [
    (".csv", CONTENT), (".tsv", CONTENT.replace(b",", b"\t")), (".jsonl", b'{"text": "x", "label": 1}\n' * 2)])
def test_a_packed_file_is_read_with_its_lines_numbers_and_that_is_said(tmp_path, caplog, suffix, content):
    path = tmp_path / f"a{suffix}.gz"
    path.write_bytes(gzip.compress(content[:20]) + gzip.compress(content[20:]))  # as `cat a.gz b.gz` gives
    rows = read(tmp_path, "classification")
    assert len(rows) == 2 and rows.where(1) == f"{path}:{2 + (suffix != '.jsonl')}"
    assert f"{path}: read unpacked by gzip" in caplog.text


PACKED = gzip.compress(CONTENT, mtime=0)  # without the time, which would stand in the tests' names


@pytest.mark.parametrize(("content", "said"), [
    (b"text,label\nx,1\n", "not packed by gzip, whatever its name says"),
    (PACKED[:-6], "damaged or was cut off"), (PACKED + b"more", "damaged"),
    (PACKED[:15] + b"\xff" + PACKED[16:], "damaged"), (gzip.compress(PACKED, mtime=0), "packed twice"),
    (gzip.compress(b"PAR1", mtime=0), "is a parquet file"), (b"", "holds no rows")],
    ids=["plain", "cut off", "followed", "changed", "packed twice", "parquet", "empty"])
def test_a_packed_file_that_is_damaged_or_another_is_refused(tmp_path, content, said):
    (tmp_path / "a.csv.gz").write_bytes(content)
    assert said in refusal(tmp_path)


def test_a_small_file_that_unpacks_to_far_more_than_data_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "ALWAYS", 1 << 20)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CONTENT + b"text and more text,1\n" * 200_000))
    assert "unpacks to more than 200 times its size" in refusal(tmp_path)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CONTENT + b"text and more text,1\n" * 2_000))
    assert len(read(tmp_path, "classification")) == 2_002


def test_a_packed_copy_beside_its_file_and_packed_splits_are_left_out(tmp_path, caplog):
    for name in ("train.csv.gz", "test.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(CONTENT))
    assert [file[-12:] for file in read(tmp_path, "classification").files] == ["train.csv.gz"]
    (tmp_path / "train.csv").write_bytes(CONTENT)
    assert [file[-9:] for file in read(tmp_path, "classification").files] == ["train.csv"]
    assert "train.csv.gz (packed, and train.csv is read)" in caplog.messages[-1]
