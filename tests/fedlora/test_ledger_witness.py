"""Tests of the witness and the chain: a ledger that was edited, rolled back, swapped or lost is refused.

So is a ledger in a place that cannot be relied on.
"""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from fedlora.privacy.ledger import Ledger, LedgerError
from fedlora.privacy.ledger.lifetime_budget import chained
from fedlora.privacy.ledger.network import bsd_mounts, file_system, is_network, linux_mounts

from .ledgers import DELTA, SHA, opened, terms, train, witness_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "ledger.sqlite"


@pytest.fixture
def used(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    train(ledger, 1)
    train(ledger, 2)
    ledger.close()
    return path


def execute(path, sql):
    with sqlite3.connect(path) as db:
        db.execute(sql)
    db.close()


EDITS = {
    "a charge voided": "UPDATE events SET event = replace(event, 'reserved', 'voided')",
    "less noise spent": "UPDATE events SET event = replace(event, '20.0', '40.0')",
    "a time changed": "UPDATE events SET event = replace(event, '\"time\":1', '\"time\":2') WHERE sequence = 4",
    "a hash changed": "UPDATE events SET sha256 = iif(sha256 LIKE 'f%', '0', 'f') || substr(sha256, 2) "
                      "WHERE sequence = 4",
    "a row in the middle deleted": "DELETE FROM events WHERE sequence = 5",
    "the last charge deleted": "DELETE FROM events WHERE sequence >= 7",
    "everything deleted": "DELETE FROM events",
    "a foreign row": "INSERT INTO events VALUES (-1, '{}', '')",
    "not text": "UPDATE events SET event = x'ff00' WHERE sequence = 4",
    "the table dropped": "DROP TABLE events",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_ledger_is_an_error(used, edit):
    opened(used).close()
    execute(used, edit)
    with pytest.raises(LedgerError, match="ledger"):
        opened(used)


def rehash(path, edit):
    """Replace each event's text by `edit(text)`, and recompute the chain's hashes."""
    db = sqlite3.connect(path)
    head = ""
    for sequence, event in db.execute("SELECT sequence, event FROM events ORDER BY sequence").fetchall():
        event = edit(event)
        head = chained(head, event)
        db.execute("UPDATE events SET event = ?, sha256 = ? WHERE sequence = ?", (event, head, sequence))
    db.commit()
    db.close()


def test_a_rehashed_chain_contradicts_the_witness(used):
    """A ledger whose hashes were all recomputed is whole by itself; only the witness contradicts it."""
    rehash(used, lambda event: event.replace('"noise_multiplier":20.0', '"noise_multiplier":40.0'))
    with pytest.raises(LedgerError, match="does not hold"):
        opened(used)


def test_every_run_says_for_which_relation_and_with_which_accountant_it_was_charged(used):
    db = sqlite3.connect(used)
    events = [json.loads(event) for event, in db.execute("SELECT event FROM events ORDER BY sequence")]
    db.close()
    [run] = [event["body"]["terms"] for event in events if event["kind"] == "run"]
    assert (run["relation"], run["accountant"], run["unit"]) == ("zero-out", "PRV or RDP", "row")


def test_a_ledger_of_format_1_is_read_and_its_run_goes_on(used):
    witness_of(used.parent).unlink()  # the ledger's hashes are about to change
    rehash(used, lambda event: event.replace('"format":3', '"format":1').replace('"relation":"zero-out",', "")
           .replace('"accountant":"PRV or RDP",', ""))
    ledger = opened(used, new=True)
    assert len(ledger.charges()) == 2
    ledger.begin_run("a", terms())
    train(ledger, 3)
    ledger.close()
    assert len(opened(used).charges()) == 3
    execute(used, "UPDATE events SET event = replace(event, '\"format\":1', '\"format\":4')")
    rehash(used, str)
    with pytest.raises(LedgerError, match=r"format that this version reads \(1 to 3\)"):
        Ledger(used)


def test_an_older_copy_of_the_ledger_is_an_error(used, tmp_path):
    shutil.copy(used, tmp_path / "backup")
    ledger = opened(used)
    ledger.begin_run("a", terms())
    train(ledger, 3)
    ledger.close()
    shutil.copy(tmp_path / "backup", used)
    with pytest.raises(LedgerError, match=r"older copy.*has seen \d+ rows.*--new-ledger"):
        opened(used)


def test_another_or_a_missing_ledger_contradicts_the_witness(used, tmp_path):
    opened(tmp_path / "other" / "ledger.sqlite").close()
    shutil.copy(tmp_path / "other" / "ledger.sqlite", used)
    with pytest.raises(LedgerError, match="written by another ledger"):
        opened(used)
    used.unlink()
    with pytest.raises(LedgerError, match="written by another ledger"):
        opened(used)


def test_a_ledger_of_which_only_the_write_ahead_log_is_left_is_an_error(used):
    used.rename(used.with_name("gone"))
    used.with_name(used.name + "-wal").write_bytes(b"left over")
    with pytest.raises(LedgerError, match="missing"):
        opened(used)


def test_a_missing_or_damaged_witness_is_an_error_once_something_left(used):
    witness = witness_of(used.parent)
    text = witness.read_text()
    for damage in (text[:-5], "[]", json.dumps(json.loads(text) | {"rows": "6"}), None):
        witness.unlink() if damage is None else witness.write_text(damage)
        with pytest.raises(LedgerError, match="witness"):
            opened(used)
    witness.write_text(json.dumps(json.loads(text) | {"dataset": "b"}))
    with pytest.raises(LedgerError, match="belongs to dataset 'b'"):
        opened(used)
    witness.write_text(text)
    opened(used)


def test_no_witness_is_asked_for_before_anything_left(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    ledger.reserve("a", "r1", 1, 0).begin()
    ledger.close()
    assert not witness_of(path.parent).exists()
    opened(path)


def test_a_witness_replaced_while_the_ledger_is_open_stops_the_release(used, tmp_path):
    ledger, foreign = opened(used), opened(other := tmp_path / "other" / "ledger.sqlite")
    foreign.begin_run("a", terms())
    train(foreign, 1)
    ledger.begin_run("a", terms())
    reservation = ledger.reserve("a", "r1", 3, 0)
    reservation.begin()
    reservation.stored(SHA)
    shutil.copy(witness_of(other.parent), witness_of(used.parent))
    with pytest.raises(LedgerError, match="written by another ledger"):
        reservation.released()
    assert ledger.charges()[-1].state == "stored"


@pytest.mark.parametrize("how", ["replaced", "deleted", "row deleted"])
def test_a_ledger_changed_while_it_is_open_is_an_error(used, how, tmp_path):
    ledger = opened(used)
    ledger.begin_run("a", terms())
    if how == "replaced":
        Ledger(tmp_path / "other")
        os.replace(tmp_path / "other", used)
    elif how == "deleted":
        used.unlink()
    else:
        execute(used, "DELETE FROM events WHERE sequence = (SELECT max(sequence) FROM events)")
    with pytest.raises(LedgerError):
        ledger.reserve("a", "r1", 3, 0)


def test_removed_fingerprints_are_an_error_before_new_ones_are_compared(path):
    ledger = opened(path)
    ledger.register("a", [b"x" * 16])
    execute(path, "DELETE FROM fingerprints")
    with pytest.raises(LedgerError, match="fingerprints"):
        ledger.register("b", [b"x" * 16])
    with pytest.raises(ValueError, match="16 bytes"):
        ledger.register("b", [b"x"])


def test_a_file_that_is_no_ledger_is_an_error_and_is_not_overwritten(path):
    path.parent.mkdir()
    for content in (b"not a database, but long enough to be looked at as one " * 20, b""):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match=str(path)):
            Ledger(path)
        assert path.read_bytes() == content


def test_a_new_ledger_is_explicit_keeps_the_damaged_one_and_leaves_its_mark_for_ever(used):
    old = opened(used)
    old.begin_run("a", terms())
    whole = used.read_bytes()
    used.write_bytes(b"damaged" * 1000)
    with pytest.raises(LedgerError, match="in use"):
        Ledger(used, new=True)
    used.write_bytes(whole)
    assert not old.created_anew
    old.close()
    used.write_bytes(b"damaged" * 1000)
    new = opened(used, new=True)
    assert new.created_anew and new.ledger_id != old.ledger_id and new.charges() == ()
    [mark] = new.marks()
    assert mark["ledger_id"] == old.ledger_id and mark["dataset"] == "a" and mark["rows"] > 0
    new.close()
    again = opened(used)
    assert again.created_anew and len(again.marks()) == 1
    assert used.with_name(used.name + ".replaced-1").read_bytes() == b"damaged" * 1000


def test_a_new_ledger_gives_up_nothing_that_is_whole(used):
    before = Ledger(used)
    again = opened(used, new=True)
    assert again.ledger_id == before.ledger_id and again.charges() == before.charges() and again.marks() == ()
    assert not again.created_anew and not list(used.parent.glob("*.replaced-*"))


def test_after_a_loss_each_data_set_goes_on_with_the_same_new_ledger(path):
    for dataset in "ab":
        ledger = opened(path, dataset=dataset)
        ledger.begin_run(dataset, terms(f"r{dataset}"))
        train(ledger, 1, f"r{dataset}", dataset)
        ledger.close()
    path.unlink()
    first = opened(path, new=True)
    with pytest.raises(LedgerError, match="another ledger"):
        opened(path, dataset="b")
    second = opened(path, dataset="b", new=True)
    assert second.ledger_id == first.ledger_id and [mark["dataset"] for mark in second.marks()] == ["a", "b"]
    for dataset in "ab":
        assert opened(path, dataset=dataset).ledger_id == first.ledger_id


@pytest.mark.parametrize("damage", ["rolled back", "witness missing"])
def test_a_contradicted_ledger_that_is_whole_goes_on_with_a_mark_and_all_its_charges(used, damage):
    backup = used.read_bytes()
    if damage == "rolled back":
        ledger = opened(used)
        ledger.begin_run("a", terms())
        train(ledger, 3)
        ledger.close()
        used.write_bytes(backup)
    else:
        witness_of(used.parent).unlink()
    with pytest.raises(LedgerError, match="--new-ledger"):
        opened(used)
    kept = opened(used, new=True)
    assert len(kept.charges()) == 2 and len(kept.marks()) == 1
    assert len(opened(used).marks()) == 1


def test_every_witness_in_the_folder_of_the_data_must_be_the_ledgers(used, tmp_path):
    folder = witness_of(used.parent).parent
    Ledger(used).check_folder(folder)
    Ledger(used).check_folder(tmp_path / "no such folder")
    other = tmp_path / "other" / "ledger.sqlite"
    with pytest.raises(LedgerError, match="another ledger"):
        Ledger(other).check_folder(folder)
    anew = Ledger(other, new=True)
    anew.check_folder(folder)
    [mark] = anew.marks()
    assert mark["dataset"] == "a" and mark["ledger_id"] == Ledger(used).ledger_id
    Ledger(other).check_folder(folder)
    ledger = opened(used)
    ledger.begin_run("a", terms())
    train(ledger, 3)
    with pytest.raises(LedgerError, match="another ledger"):  # more was spent since than the mark gave up
        Ledger(other).check_folder(folder)


def test_a_key_that_is_lost_is_no_dead_end(path):
    ledger = opened(path)
    ledger.register("a", [b"x" * 16])
    ledger.fingerprint_key()
    ledger.close()
    path.with_name(path.name + "-key").unlink()
    with pytest.raises(LedgerError, match="key"):
        opened(path).fingerprint_key()
    assert len(opened(path, new=True).fingerprint_key()) == 32


def test_a_new_ledger_helps_where_the_old_one_and_the_witness_are_unreadable(used):
    used.write_bytes(b"damaged" * 1000)
    witness_of(used.parent).write_text("damaged")
    with pytest.raises(LedgerError):
        opened(used)
    new = opened(used, new=True)
    assert [mark["ledger_id"] for mark in new.marks()] == ["unreadable"]
    new.close()
    opened(used)


# Real and simulated ledgers, and network file systems


def test_real_and_simulated_ledgers_are_never_mixed(path, tmp_path):
    Ledger(path).close()
    with pytest.raises(LedgerError, match="is a real ledger and a simulated one is needed"):
        Ledger(path, simulated=True)
    Ledger(tmp_path / "s", simulated=True).close()
    with pytest.raises(LedgerError, match="is a simulated ledger and a real one is needed"):
        Ledger(tmp_path / "s")
    with pytest.raises(LedgerError, match="in memory"):
        Ledger(None)
    with pytest.raises(LedgerError, match="witness"):
        Ledger(None, simulated=True).declare("a", epsilon=1.0, delta=DELTA, witness=witness_of(tmp_path))


MOUNTS = r"""/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local ext4 rw 0 0
//nas/share /mnt/my\040share cifs rw 0 0
me@host: /mnt/remote fuse.sshfs rw 0 0
/dev/sdc1 /mnt/usb fuseblk rw 0 0
C: /mnt/c 9p rw 0 0
"""


@pytest.mark.parametrize(("place", "kind", "network"), [
    ("/var/lib/ledger", "ext4", False), ("/home/me/ledger", "nfs4", True), ("/home/local/ledger", "ext4", False),
    ("/mnt/my share/deep/er", "cifs", True), ("/mnt/remote", "fuse.sshfs", True), ("/mnt/usb/x", "fuseblk", False),
    ("/mnt/c/Users", "9p", True), ("/homeless/x", "ext4", False)])
def test_network_file_systems_are_told_from_local_ones(place, kind, network):
    found = file_system(Path(place), linux_mounts(MOUNTS))
    assert found == kind and is_network(found) == network


def test_macs_mounts_are_understood():
    text = "/dev/disk1s1 on / (apfs, local)\n//me@nas/share on /Volumes/my share (smbfs, nodev)\n"
    assert bsd_mounts(text) == [("/", "apfs"), ("/Volumes/my share", "smbfs")]


def test_a_real_ledger_on_a_network_file_system_is_refused(path, monkeypatch):
    monkeypatch.setattr("fedlora.privacy.ledger.hash_chain.network_file_system", lambda place: "nfs4")
    with pytest.raises(LedgerError, match=r"network file system.*nfs4.*local disk"):
        Ledger(path)
    Ledger(path, simulated=True)
