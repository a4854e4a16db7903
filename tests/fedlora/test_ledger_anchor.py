"""Tests of the anchor: it reveals a ledger that was put back, and tells the server that keeps it nothing."""

import secrets
import shutil
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.plan import ANCHOR_BYTES
from fedlora.privacy.ledger import Ledger, LedgerError
from fedlora.privacy.ledger.anchor import seal, unseal

from .ledgers import opened, terms, train

KEY = bytes(range(32))
heads = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(st.integers(0, 2**64 - 1), heads, st.binary(min_size=32, max_size=32))
def test_what_was_sealed_is_read_with_its_key_alone_and_has_one_length(rows, head, other):
    sealed = seal(KEY, rows, head)
    assert unseal(KEY, sealed) == (rows, head) and len(sealed) == ANCHOR_BYTES
    assert other == KEY or unseal(other, sealed) is None


@given(st.integers(0, 8 * ANCHOR_BYTES - 1))
def test_a_changed_bit_is_noticed(bit):
    sealed = int.from_bytes(seal(KEY, 7, "ab" * 32), "big")
    assert unseal(KEY, (sealed ^ 1 << bit).to_bytes(ANCHOR_BYTES, "big")) is None


@pytest.mark.parametrize("sealed", [b"", b"x", bytes(ANCHOR_BYTES - 1), bytes(ANCHOR_BYTES), bytes(ANCHOR_BYTES + 1)])
def test_whatever_else_a_server_says_is_no_anchor(sealed):
    assert unseal(KEY, sealed) is None


def test_two_anchors_of_one_state_have_nothing_in_common():
    """About half of all bits differ between any two anchors, whatever they hold; 0.8 is 40 standard deviations off."""
    sealed = [seal(KEY, rows, "ab" * 32) for rows in (1, 1, 2, 2**63)]
    for one, other in combinations(sealed, 2):
        different = (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count() / (8 * ANCHOR_BYTES)
        assert 0.3 < different < 0.7


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "ledger.sqlite"


def spend(path, *rounds, **options):
    """Open the ledger, train these rounds, and close it. Returns the anchor of each upload."""
    ledger = opened(path, **options)
    try:
        ledger.begin_run("a", terms())
        return [train(ledger, round) and ledger.anchor() for round in rounds]
    finally:
        ledger.close()


def restored(path, copy):
    """Put a ledger's folder (ledger, key and witness) back to an earlier copy."""
    shutil.rmtree(path.parent)
    shutil.copytree(copy, path.parent)


def test_a_ledger_holds_against_every_anchor_that_it_ever_gave(path):
    anchors = spend(path, 1, 2) + spend(path, 3)
    ledger = opened(path)
    assert [ledger.check_anchor(sealed) for sealed in anchors] == [True] * 3 and ledger.marks() == ()
    ledger.close()


def test_a_ledger_that_was_put_back_with_its_witness_and_key_is_refused_until_its_owner_decides(path, tmp_path):
    before = spend(path, 1)
    shutil.copytree(path.parent, tmp_path / "copy")
    after = spend(path, 2, 3)
    restored(path, tmp_path / "copy")
    ledger = opened(path)  # no error: its files agree with each other
    assert ledger.check_anchor(before[-1])
    rows = ledger.book().rows
    for sealed in after:
        with pytest.raises(LedgerError, match=r"with \d+ rows, is an older copy .* anchor of \d+ rows.*--new-ledger"):
            ledger.check_anchor(sealed)
    assert ledger.marks() == () and ledger.book().rows == rows, "a refusal changes nothing"
    ledger.close()

    decided = opened(path, new=True)
    assert not decided.created_anew, "it is whole, and kept"
    assert decided.check_anchor(after[-1])
    [mark] = decided.marks()
    assert (mark["ledger_id"], mark["rows"] > rows) == (decided.ledger_id, True)
    decided.close()
    [newest] = spend(path, 4)
    later = opened(path)
    assert later.check_anchor(newest) and later.check_anchor(after[-1]), "the mark stays, and need be made once"
    assert later.marks() == (mark,)
    later.close()


def test_a_copy_that_went_on_by_itself_is_refused_by_the_head_at_the_same_row(path, tmp_path):
    spend(path, 1)
    shutil.copytree(path.parent, tmp_path / "copy")
    left = spend(path, 2)
    restored(path, tmp_path / "copy")
    spend(path, 3, 4)
    ledger = opened(path)
    with pytest.raises(LedgerError, match="older copy"):
        ledger.check_anchor(left[-1])
    ledger.close()


def test_a_foreign_anchor_says_nothing(path, tmp_path):
    spend(path, 1)
    [foreign] = spend(tmp_path / "other" / "ledger.sqlite", 1)
    ledger = opened(path)
    changed = bytearray(ledger.anchor())
    changed[20] ^= 1
    for sealed in (foreign, bytes(changed), secrets.token_bytes(ANCHOR_BYTES), b"short"):
        assert not ledger.check_anchor(sealed)
    assert ledger.marks() == ()
    ledger.close()


def test_an_anchor_costs_the_ledger_no_row(path):
    spend(path, 1)
    ledger = opened(path)
    ledger.anchor()  # makes the key, which is one row
    rows = ledger.book().rows
    sealed = [ledger.anchor() for _ in range(3)]
    assert ledger.book().rows == rows and len(set(sealed)) == 3
    ledger.close()


def test_a_simulated_ledger_has_none(path):
    for where in (None, path):
        ledger = Ledger(where, simulated=True)
        ledger.begin_run("a", terms())
        train(ledger, 1)
        assert ledger.anchor() == b""
        ledger.close()
