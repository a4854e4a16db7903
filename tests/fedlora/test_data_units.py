"""The column of privacy units: its ids are read alike in every format, and are never empty."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import ClientConfig, read_config
from fedlora.data import normalize_label, normalize_unit
from fedlora.privacy import DatasetPolicy
from fedlora.tasks import read
from tests.fedlora.data_files import SECRET, refusal, write, write_lines


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_units(tmp_path, suffix):
    ids = ["p 1", " p 1 ", "p 2", "7"]
    path = write(tmp_path / f"a{suffix}", ["text", "label", "patient"], [(f"note {i}", 1, i) for i in ids])
    rows = read(path, "classification", unit="patient")
    assert rows.units == ("p 1", "p 1", "p 2", "7")
    assert rows.take([3, 0]).units == ("7", "p 1")
    assert read(path, "classification").units is None and read(path, "causal-lm", unit="patient").units == rows.units


@pytest.mark.parametrize(("value", "name"), [
    (7, "7"), (7.0, "7"), ("7", "7"), (" 7 ", "7"), ("7.0", "7"), ("007", "007"), ("P1", "P1"), (-3, "-3"),
    ("e\u0301", "\u00e9"), (2**60 + 1, str(2**60 + 1)), (str(2**60 + 1), str(2**60 + 1)),
    (None, None), ("", None), (" ", None), (float("nan"), None), ("nan", None), ("NA", None), ("null", None)])
def test_unit_ids_are_normalised(value, name):
    assert normalize_unit(value) == name


INVISIBLE = ("\u200b", "\ufeff", "\u00ad", "\u200d", "\u2060", "\u202e")
FULL_WIDTH = {ord(character): ord(character) + 0xFEE0 for character in map(chr, range(0x21, 0x7F))}


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1), st.data())
def test_an_id_and_a_label_are_the_same_however_they_are_spelled(name, data):
    spelled = "".join(data.draw(st.sampled_from([character, character.translate(FULL_WIDTH)]))
                      + data.draw(st.sampled_from(["", *INVISIBLE])) for character in name)
    spelled = data.draw(st.sampled_from(["", " ", "\u3000", "\ufeff "])) + spelled
    assert normalize_unit(spelled) == normalize_unit(name) and normalize_label(spelled) == normalize_label(name)


@given(st.text(), st.sampled_from(INVISIBLE))
def test_the_spelling_of_a_name_is_its_own_and_has_nothing_invisible(name, invisible):
    label = normalize_label(name)
    if label is not None:
        assert normalize_label(label) == label == normalize_label(invisible + label)
        assert not any(unicodedata.category(character) == "Cf" for character in label)


def test_one_patient_is_one_unit_and_one_declared_label_however_they_are_spelled(tmp_path):
    sevens = ["7", "7\u200b", "\ufeff7", "7\u00ad", "\uff17"]
    path = write(tmp_path / "a.csv", ["text", "label", "patient"], [("x", one, one) for one in sevens])
    rows = read(path, "classification", unit="patient")
    assert set(rows.units) == set(rows.labels) == {"7"}
    declared = DatasetPolicy("a", "a", 1.0, 1e-5, labels=("\uff17", "8"))
    assert declared.labels == ("7", "8")
    given = read_config(ClientConfig, ["--labels=\uff17\u200b,8"])
    assert given.labels == ("7", "8")


def test_one_id_is_one_unit_in_all_files_and_formats_of_a_folder(tmp_path):
    write(tmp_path / "a.csv", ["text", "label", "patient"], [("x", 1, "7"), ("y", 1, "8")])
    write(tmp_path / "b.jsonl", ["text", "label", "patient"], [("x", 1, 7)])
    write(tmp_path / "c.parquet", ["text", "label", "patient"], [("x", 1, 7.0)])
    assert read(tmp_path, "classification", unit="patient").units == ("7", "8", "7", "7")


@pytest.mark.parametrize("value", [None, "", " ", "NaN", 0.5, True, [SECRET], 1e300])
def test_a_row_without_an_id_of_its_unit_is_refused(tmp_path, value):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x", "label": 1, "patient": SECRET},
                       {"text": SECRET, "label": 1, "patient": value})
    message = refusal(path, unit="patient")
    assert f"{path}:2" in message and "patient" in message and ("Fill it" in message or "Write it as" in message)
    assert "1e" not in message and "0.5" not in message


def test_an_id_or_a_role_with_half_a_character_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": SECRET, "label": 1, "patient": "\ud83d"})
    assert f"{path}:1: patient holds half of a Unicode surrogate" in refusal(path, unit="patient")
    path = write_lines(tmp_path / "b.jsonl", {"messages": [{"role": "\ud83d", "content": SECRET},
                                                           {"role": "assistant", "content": SECRET}]})
    assert f"{path}:1: role of a message holds half of a Unicode surrogate" in refusal(path, "causal-lm")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_an_empty_id_is_refused_in_every_format(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label", "patient"], [("x", 1, "p"), (SECRET, 1, None)])
    message = refusal(path, unit="patient")
    assert f"{path}:{'row 2' if suffix == '.parquet' else 3}" in message and "Fill it, or remove the row" in message


def test_a_missing_unit_column_lists_those_present(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label", "pid"], [(SECRET, 1, "p")])
    message = refusal(path, unit="patient_id")
    assert "no column patient_id" in message and "its columns are: text, label, pid" in message
    assert "--privacy-unit column:NAME" in message and f"{path}:1" in message
    write(tmp_path / "b.csv", ["text", "label"], [("x", 1)])
    assert f"{tmp_path / 'b.csv'}:1: there is no column pid" in refusal(tmp_path, unit="pid")
