"""A ledger that is opened for a trial answers as the real one would, and writes nothing."""

import pytest

from fedlora.privacy import Ledger, LedgerError, RunTerms

TERMS = RunTerms("ab" * 8, "a" * 64, "row", 1000, 0.05, 2.0, 1e-5, 0.1, {"adapter": 1.0}, 4, 10)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def path(tmp_path):
    ledger = Ledger(tmp_path / "ledger" / "ledger.sqlite")
    ledger.declare("north", epsilon=4.0, delta=1e-5, witness=tmp_path / "data" / "witness.json")
    ledger.register("north", [b"x" * 16])
    ledger.begin_run("north", TERMS)
    ledger.reserve("north", TERMS.run_id, 1, 0).begin()
    ledger.close()
    return tmp_path / "ledger" / "ledger.sqlite"


def test_a_trial_knows_what_was_spent_and_leaves_every_byte(path, tmp_path):
    before = files(tmp_path)
    trial, real = Ledger(path, trial=True), Ledger(path)
    assert trial.ledger_id == real.ledger_id and trial.charges() == real.charges()
    trial.declare("north", epsilon=1.0, delta=1e-5)
    trial.register("south", [b"x" * 16], place="/south")
    assert trial.overlapping("south") == ("north",) and trial.lifetime("north").epsilon == 1.0
    assert real.overlapping("south") == () and real.lifetime("north").epsilon == 4.0
    assert trial.current("north", "cd" * 8).runs["north", TERMS.run_id].active is False
    for ledger in (trial, real):
        ledger.close()
    assert files(tmp_path) == before


def test_a_trial_charges_no_run(path):
    trial = Ledger(path, trial=True)
    with pytest.raises(LedgerError, match="no run can be charged"):
        trial.begin_run("north", TERMS)
    with pytest.raises(LedgerError, match="not held by this process"):
        trial.reserve("north", TERMS.run_id, 2, 0)


def test_where_there_is_no_ledger_a_trial_makes_none(tmp_path):
    trial = Ledger(tmp_path / "none" / "ledger.sqlite", trial=True)
    assert len(trial.fingerprint_key()) == 32 and trial.datasets() == {}
    trial.watch("north", tmp_path / "witness.json")
    trial.testify("north")
    trial.close()
    assert not files(tmp_path) and not (tmp_path / "none").exists()


def test_a_ledger_that_is_damaged_is_refused_and_with_new_ledger_only_replaced_for_the_trial(path, tmp_path):
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4000)
    before = files(tmp_path)
    with pytest.raises(LedgerError, match="--new-ledger"):
        Ledger(path, trial=True)
    trial = Ledger(path, trial=True, new=True)
    assert trial.created_anew and trial.charges() == ()
    trial.close()
    assert files(tmp_path) == before
