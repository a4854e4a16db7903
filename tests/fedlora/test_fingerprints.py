"""Tests of fingerprints: copies of a record are recognised, other records are not, and the text cannot be read."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.rows import Rows
from fedlora.privacy.ledger import Ledger, LedgerError
from fedlora.privacy.ledger.fingerprints import fingerprints, normalized

KEY = bytes(range(32))


def rows(*texts, **columns):
    return Rows(**{"kind": "text", "texts": texts, "seconds": None, "messages": None, "labels": None,
                   "files": ("a.jsonl",), "file_of": np.zeros(len(texts), dtype=np.int64),
                   "lines": np.arange(1, len(texts) + 1)} | columns)


def test_spelling_variants_of_one_text_are_one_record():
    variants = rows("Straße  Café", " STRASSE CAFE\u0301\n", "strasse\tcafé", "Strasse Cafe")
    first, second, third, other = fingerprints(variants, KEY, None)
    assert first == second == third != other
    assert len(first) == 16


@given(st.text(max_size=30))
def test_normalising_twice_is_normalising_once(text):
    assert normalized(normalized(text)) == normalized(text)


def test_a_relabelled_or_reordered_copy_is_the_same_set_of_records():
    original = rows("a", "b", "c", labels=("x", "y", "z"))
    copy = dataclasses.replace(original.take([2, 0, 1]), labels=("z", "z", "z"))
    assert set(fingerprints(original, KEY, None)) == set(fingerprints(copy, KEY, None))


def test_texts_do_not_run_into_each_other():
    pairs = rows("a b", "a", "a b c", kind="pair", seconds=("c", "b c", ""))
    talk = rows("", "", kind="messages",
                messages=((("user", "a b"), ("assistant", "c")), (("user", "a"), ("user", "z"))))
    found = fingerprints(pairs, KEY, None) + fingerprints(talk, KEY, None)
    assert found[3] == found[0], "a pair and a conversation with the same two texts are the same record"
    assert len(set(found)) == len(found) - 1


def test_units_are_added_to_the_rows_once_each_and_are_never_taken_for_a_row():
    three = rows("7", "b", "c")
    found = fingerprints(three, KEY, ["7", "p2", " 7 "])
    assert found[:3] == fingerprints(three, KEY, None)
    assert len(found) == 3 + 2 and len(set(found)) == 5


def test_another_key_gives_unrelated_fingerprints():
    assert not set(fingerprints(rows("a", "b"), KEY, None)) & set(fingerprints(rows("a", "b"), bytes(32), None))


@pytest.mark.parametrize("empty", ["", " \t"])
def test_an_empty_unit_is_an_error_that_names_the_line_and_not_the_text(empty):
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*empty") as error:
        fingerprints(rows("hidden-1", "hidden-2"), KEY, ["p1", empty])
    assert "hidden" not in str(error.value)
    with pytest.raises(ValueError, match="1 units for 2 rows"):
        fingerprints(rows("a", "b"), KEY, ["p1"])


def test_the_key_is_made_once_for_the_owner_alone_and_its_loss_is_an_error(tmp_path):
    path = tmp_path / "ledger.sqlite"
    key = Ledger(path).fingerprint_key()
    assert len(key) == 32 and Ledger(path).fingerprint_key() == key
    file = tmp_path / "ledger.sqlite-key"
    assert file.stat().st_mode & 0o777 == 0o600 and path.stat().st_mode & 0o777 == 0o600
    for damage in (lambda: file.write_bytes(bytes(32)), lambda: file.write_bytes(b"short"), file.unlink):
        damage()
        with pytest.raises(LedgerError, match="restore it"):
            Ledger(path).fingerprint_key()
