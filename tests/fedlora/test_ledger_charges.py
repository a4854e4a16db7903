"""Tests of charges: every training is charged once, before it reads a record; on a full disk nothing is trained."""

import dataclasses
import math
import threading

import pytest

from fedlora.privacy.ledger import BudgetExhausted, Ledger, LedgerError, RunTerms

from .ledgers import DELTA, SHA, ended, forked, full_disk, gaussian_epsilon, opened, terms, train


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "ledger.sqlite"


def test_a_charge_is_there_for_a_new_process_whatever_became_of_it(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    train(ledger, 1)
    ledger.reserve("a", "r1", 2, 0)
    ledger.reserve("a", "r1", 3, 0).begin()
    ledger.reserve("a", "r1", 4, 0).void()
    ledger.close()
    again = opened(path)
    assert [charge.state for charge in again.charges("a", "r1")] == ["released", "reserved", "reserved", "voided"]
    assert again.history("a", "r1") == (dataclasses.replace(again.history("a", "r1")[0], steps=3 * 2),)
    assert again.epsilon("a", "r1") >= gaussian_epsilon([(20.0, 6)])
    assert again.terms("a", "r1") == terms()


def test_a_training_is_charged_once_and_a_run_never_trains_beyond_its_maximum(path):
    ledger = opened(path)
    with pytest.raises(LedgerError, match="begin it first"):
        ledger.reserve("a", "r1", 1, 0)
    ledger.begin_run("a", terms(max_participations=2))
    train(ledger, 1)
    with pytest.raises(LedgerError, match="charged before"):
        ledger.reserve("a", "r1", 1, 0)
    ledger.reserve("a", "r1", 1, 1).void()
    train(ledger, 1, attempt=1)
    with pytest.raises(BudgetExhausted, match="begun 2 trainings"):
        ledger.reserve("a", "r1", 2, 0)


def test_only_a_reservation_that_read_nothing_can_be_voided_and_then_it_cannot_be_used(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    begun, voided = ledger.reserve("a", "r1", 1, 0), ledger.reserve("a", "r1", 2, 0)
    begun.begin()
    voided.void()
    for misuse in (begun.void, begun.begin, voided.begin, voided.void, lambda: voided.stored(SHA), voided.released,
                   begun.released):
        with pytest.raises(LedgerError):
            misuse()
    assert [charge.state for charge in ledger.charges()] == ["reserved", "voided"]


def test_a_fork_can_neither_void_nor_use_what_its_parent_reserved(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    reservation = ledger.reserve("a", "r1", 1, 0)

    def work():
        for misuse in (reservation.void, reservation.begin, lambda: ledger.reserve("a", "r1", 2, 0)):
            with pytest.raises(LedgerError, match="forked"):
                misuse()

    assert ended(forked(work)) == 0
    reservation.begin()


def test_sending_again_costs_nothing_and_needs_the_stored_bytes(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    sent = train(ledger, 1)
    sent.released()
    stored = ledger.reserve("a", "r1", 2, 0)
    stored.begin()
    stored.stored("1" * 64)
    ledger.reserve("a", "r1", 3, 0).begin()
    before = ledger.lifetime("a").spent
    ledger.close()
    again = opened(path)
    again.released_again("a", "r1", 1, 0, SHA)
    again.released_again("a", "r1", 2, 0)
    for round, sha256 in ((2, SHA), (3, None), (4, None)):
        with pytest.raises(LedgerError, match="may not be sent"):
            again.released_again("a", "r1", round, 0, sha256)
    assert again.lifetime("a").spent == before
    assert [charge.state for charge in again.charges()] == ["released", "released", "reserved"]


def test_terms_survive_and_cannot_change_within_a_run(path):
    fixed = terms(scales={"adapter": 1.0, "head": 0.1}, sampling_rate=1 / 3)
    ledger = opened(path, epsilon=100.0)
    ledger.begin_run("a", fixed)
    ledger.begin_run("a", fixed)
    ledger.close()
    again = opened(path, epsilon=100.0)
    assert again.terms("a", "r1") == fixed and again.terms("a", "r2") is None
    with pytest.raises(LedgerError, match=r"noise_multiplier 20\.0, now 19\.0"):
        again.begin_run("a", dataclasses.replace(fixed, noise_multiplier=19.0))
    for wrong in ({"noise_multiplier": 0.0}, {"sampling_rate": 1.5}, {"max_participations": 0}, {"delta": None}):
        with pytest.raises(ValueError):
            terms(**wrong)


def test_a_run_without_noise_is_infinite_and_fits_no_lifetime(path):
    ledger = opened(path)
    off = terms(noise_multiplier=None, delta=None)
    assert not ledger.fits("a", off)
    ledger.begin_run("undeclared", off)
    assert ledger.epsilon("undeclared", "r1") == 0 and ledger.lifetime("undeclared").spent == 0
    ledger.reserve("undeclared", "r1", 1, 0)
    assert ledger.epsilon("undeclared", "r1") == math.inf == ledger.lifetime("undeclared").spent
    with pytest.raises(ValueError, match="infinite"):
        ledger.history("undeclared", "r1")
    ledger.register("a", [SHA[:16].encode()])
    ledger.register("undeclared", [SHA[:16].encode()])
    assert not ledger.fits("a", terms("r9")), "who trained on these records without noise has no budget left for them"


def test_threads_of_one_process_take_turns(path):
    ledger = opened(path)
    ledger.begin_run("a", terms(max_participations=16, noise_multiplier=100.0))
    threads = [threading.Thread(target=lambda first=first: [train(ledger, first + i) for i in range(4)])
               for first in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened(path).charges()) == 16


def test_a_clock_that_jumps_changes_nothing_but_the_recorded_times(path):
    now = [1e9]
    ledger = opened(path, clock=lambda: now[0])
    ledger.begin_run("a", terms())
    for round, now[0] in enumerate([5e9, -1.0, 0.0], start=1):
        train(ledger, round)
    again = opened(path)
    assert [(c.round, c.time) for c in again.charges()] == [(1, 5e9), (2, -1.0), (3, 0.0)]


def test_a_ledger_in_memory_keeps_the_same_rules():
    ledger = Ledger(None, simulated=True)
    ledger.declare("a", epsilon=2.0, delta=DELTA)
    ledger.begin_run("a", terms(noise_multiplier=10.0, max_participations=4))
    train(ledger, 1)
    assert ledger.lifetime("a").spent >= gaussian_epsilon([(10.0, 2)])
    assert not ledger.fits("a", terms("r2", noise_multiplier=10.0))
    assert len(ledger.fingerprint_key()) == 32


def test_a_real_ledger_is_written_through_to_the_disk_at_every_commit(path):
    for simulated, synchronous in ((False, 2), (True, 0)):
        ledger = Ledger(path.with_name(f"{simulated}"), simulated=simulated)
        assert ledger._chain.db.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert ledger._chain.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_run_terms_are_what_is_agreed():
    assert [field.name for field in dataclasses.fields(RunTerms)] == [
        "run_id", "plan_sha256", "unit", "declared_size", "sampling_rate", "noise_multiplier", "delta", "clip_norm",
        "scales", "local_steps", "max_participations", "relation", "accountant", "mechanism",
        "aggregate_noise_multiplier", "least_members", "colluding"]


# A full disk


def test_on_a_full_disk_nothing_is_trained_and_nothing_leaves(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    stored = ledger.reserve("a", "r1", 1, 0)
    stored.begin()
    stored.stored(SHA)
    voided = ledger.reserve("a", "r1", 2, 0)
    with full_disk():
        with pytest.raises(LedgerError, match=r"nothing may be trained.*make room on the disk"):
            ledger.reserve("a", "r1", 3, 0)
        with pytest.raises(LedgerError, match="nothing may leave"):
            stored.released()
        with pytest.raises(LedgerError):
            voided.void()
    with pytest.raises(LedgerError):
        voided.begin()
    assert [charge.state for charge in ledger.charges()] == ["stored", "reserved"]
    stored.released()
    train(ledger, 3)
    assert [charge.state for charge in opened(path).charges()] == ["released", "reserved", "released"]


def test_a_ledger_that_cannot_be_made_is_an_error_and_leaves_nothing(path):
    with full_disk(), pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(path)
    assert [file.name for file in path.parent.iterdir() if not file.name.endswith("-runs")] == []
    Ledger(path)
