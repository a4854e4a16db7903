"""Epsilon recorded is never below epsilon spent, never above the lifetime, and a doubtful ledger is an error."""

import dataclasses
import json
import math
import os
import resource
import shutil
import sqlite3
import tempfile
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.privacy import Accountant
from fedlora.privacy.accounting import RDP_ORDERS, grouped, rdp, rdp_epsilon
from fedlora.privacy.ledger import BudgetExhausted, Ledger, LedgerError, RunTerms
from fedlora.privacy.ledger.lifetime import FILTER_ORDERS, filter_epsilon
from fedlora.privacy.ledger.network import bsd_mounts, file_system, is_network, linux_mounts

from .ledgers import DELTA, ended, forked, gaussian_epsilon, terms, witness_of

SHA = "0" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "ledger.sqlite"


def opened(path, epsilon=8.0, dataset="a", **options):
    ledger = Ledger(path, **options)
    try:
        ledger.declare(dataset, epsilon=epsilon, delta=DELTA, witness=witness_of(path.parent, dataset))
    except LedgerError:
        ledger.close()
        raise
    return ledger


def train(ledger, round, run_id="r1", dataset="a", attempt=0):
    reservation = ledger.reserve(dataset, run_id, round, attempt)
    reservation.begin()
    reservation.stored(SHA)
    reservation.released()
    return reservation


@contextmanager
def full_disk():
    """No file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The property: any sequence of everything that can happen to two ledgers on one file


RUNS = {(dataset, f"{dataset}{i}"): terms(f"{dataset}{i}", noise_multiplier=sigma, max_participations=most)
        for dataset in "abc" for i, (sigma, most) in enumerate([(20.0, 5), (10.0, 3), (6.0, 2)])}
PAYS = {"a": "ab", "b": "ab", "c": "c"}


class World:
    """`a` and `b` share a record; `c` shares one with `a` but is declared distinct. `truth` is all that was read."""

    def __init__(self, folder):
        self.folder, self.now = folder, 1e9
        self.limits = {"a": 2.0, "b": 1.5, "c": 1.0}
        self.ledgers, self.held, self.open, self.truth = [None, None], set(), [], []
        self.restart(0)
        self.restart(1)
        self.ledgers[0].register("a", [b"x" * 16, b"y" * 16])
        self.ledgers[1].register("b", [b"y" * 16, b"z" * 16])
        self.ledgers[1].register("c", [b"x" * 16])
        for which, key in enumerate([("a", "a0"), ("b", "b1")]):
            self.ledgers[which].begin_run(key[0], RUNS[key])
            self.held.add((which, key))

    def declare(self, which, dataset):
        self.ledgers[which].declare(dataset, epsilon=self.limits[dataset], delta=DELTA,
                                    distinct="a" if dataset == "c" else (), witness=witness_of(self.folder, dataset))

    def restart(self, i, j=0, k=0):
        which = i % 2
        if self.ledgers[which] is not None:
            self.ledgers[which].close()
        self.held = {(owner, key) for owner, key in self.held if owner != which}
        self.open = [(owner, *rest) for owner, *rest in self.open if owner != which]
        self.ledgers[which] = Ledger(self.folder / "ledger", clock=lambda: self.now)
        for dataset in self.limits:
            self.declare(which, dataset)

    def the_clock_jumps(self, i, j, k):
        self.now += [-1e9, -3600.0, 0.0, 1e12][i % 4]

    def the_owner_raises_a_lifetime(self, i, j, k):
        self.limits["abc"[i % 3]] *= 1.2
        self.declare(j % 2, "abc"[i % 3])

    def begin_run(self, i, j, k):
        key = sorted(RUNS)[j % len(RUNS)]
        self.ledgers[i % 2].begin_run(key[0], RUNS[key])
        self.held.add((i % 2, key))

    def end_run(self, i, j, k):
        which, key = sorted(self.held)[i % len(self.held)]
        self.ledgers[which].end_run(*key)
        self.held.remove((which, key))

    def reserve(self, i, j, k):
        which, key = sorted(self.held)[i % len(self.held)]
        self.open.append((which, key, self.ledgers[which].reserve(*key, j % 5, k % 2)))

    def train(self, i, j, k):
        self.reserve(i, j, k)
        self.read(-1, j, k)

    def read(self, i, j, k):
        _, key, reservation = self.open[i if i < 0 else i % len(self.open)]
        reservation.begin()
        self.truth.append((key, reservation.sequence))

    def void(self, i, j, k):
        self.open[i % len(self.open)][-1].void()

    def store(self, i, j, k):
        self.open[i % len(self.open)][-1].stored(SHA)

    def release(self, i, j, k):
        self.open[i % len(self.open)][-1].released()

    def check(self):
        ledger = self.ledgers[len(self.truth) % 2]
        charges = {charge.sequence: charge for charge in ledger.charges()}
        for key, sequence in self.truth:
            assert (charges[sequence].dataset, charges[sequence].run_id) == key
            assert charges[sequence].state != "voided"
        for dataset, paid in PAYS.items():
            spent = gaussian_epsilon([(RUNS[key].noise_multiplier, RUNS[key].local_steps)
                                      for key, _ in self.truth if key[0] in paid])
            lifetime = ledger.lifetime(dataset)
            assert spent <= lifetime.spent + 1e-9
            assert lifetime.spent <= lifetime.committed <= self.limits[dataset]


OPERATIONS = st.sampled_from(["restart", "the_clock_jumps", "the_owner_raises_a_lifetime", "end_run", "reserve", "read",
                              "void", "store", "release", *3 * ["begin_run"], *4 * ["train"]])
STEP = st.tuples(OPERATIONS, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.sampled_from(4 * [0] + [1]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=15, max_size=40))
def test_recorded_is_never_below_the_truth_nor_above_the_lifetime_whatever_happens(steps):
    folder = Path(tempfile.mkdtemp())
    world = World(folder)
    try:
        for name, i, j, k, full in steps:
            if (not world.held and name in ("end_run", "reserve", "train")) or (
                    not world.open and name in ("read", "void", "store", "release")):
                continue
            with suppress(LedgerError), full_disk() if full and name != "restart" else nullcontext():
                getattr(world, name)(i, j, k)
            world.check()
    finally:
        for ledger in world.ledgers:
            ledger.close()
        shutil.rmtree(folder)


# Charges


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
    fixed = terms(unit="column:patient_id", scales={"adapter": 1.0, "head": 0.1}, sampling_rate=1 / 3, group_size=3)
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


# The lifetime


def test_the_filter_bounds_the_exact_epsilon_and_shares_delta_among_its_orders():
    for sigma, steps in ((20.0, 10), (3.0, 4), (100.0, 1000)):
        spends = terms(noise_multiplier=sigma, local_steps=steps).spends(1)
        ours = filter_epsilon([spends], DELTA, FILTER_ORDERS)
        best = filter_epsilon([spends], DELTA * len(RDP_ORDERS), RDP_ORDERS)
        assert gaussian_epsilon([(sigma, steps)]) < best < ours < 1.25 * best
        assert best == pytest.approx(rdp_epsilon(spends, DELTA), rel=0.02)
    assert filter_epsilon([], DELTA, FILTER_ORDERS) == 0
    assert np.isinf(rdp(terms(noise_multiplier=1e-200).spends(1)[0], (2,))).all()


@pytest.mark.parametrize("k", [2, 5, 20])
@pytest.mark.parametrize("q", [0.01, 0.3])
@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_group_privacy_bounds_a_person_with_k_rows_that_are_drawn_one_by_one(k, q, sigma):
    """Numerically, in both directions: of k rows a binomial number is drawn, each moves the sum by a clip norm."""
    x = np.linspace(-12 * sigma, k + 12 * sigma, 40_001)

    def density(mean, deviation):
        return np.exp(-((x - mean) / deviation) ** 2 / 2) / deviation

    absent = density(0, sigma)
    drawn = sum(math.comb(k, j) * q**j * (1 - q) ** (k - j) * density(j, sigma) for j in range(k + 1))
    [spend] = terms(sampling_rate=q, noise_multiplier=sigma, group_size=k, local_steps=1).spends(1)
    charged = (1 - spend.sampling_rate) * absent + spend.sampling_rate * density(k, spend.noise_multiplier * k)
    for epsilon in (0.0, 0.1, 1.0, 3.0):
        for true, bound in ((drawn - math.exp(epsilon) * absent, charged - math.exp(epsilon) * absent),
                            (absent - math.exp(epsilon) * drawn, absent - math.exp(epsilon) * charged)):
            assert np.maximum(true, 0).sum() <= np.maximum(bound, 0).sum() * (1 + 1e-9) + 1e-9
    assert grouped((spend,), 1) == (spend,)


def sole(**changes):
    """A run that PRV allows within epsilon = 1 and the filter does not."""
    return terms(**{"noise_multiplier": 14.5, "local_steps": 1, "max_participations": 10} | changes)


def test_a_sole_run_may_spend_what_prv_allows_and_closes_the_budget(path):
    ledger, run = opened(path, epsilon=1.0), sole()
    assert Accountant(run.spends(10)).epsilon(DELTA) <= 1.0 < filter_epsilon([run.spends(10)], DELTA, FILTER_ORDERS)
    ledger.begin_run("a", run)
    assert ledger.lifetime("a").spent == 0 and ledger.lifetime("a").closed_by == "r1"
    assert not ledger.fits("a", terms("r2", noise_multiplier=1000.0))
    train(ledger, 1)
    ledger.end_run("a", "r1")
    state = ledger.lifetime("a")
    assert (state.closed_by, state.remaining) == ("r1", 0.0)
    assert gaussian_epsilon([(14.5, 10)]) <= state.spent <= 1.0, "the planned maximum counts, whatever was begun"
    with pytest.raises(BudgetExhausted, match="closed by run r1"):
        ledger.begin_run("a", terms("r2", noise_multiplier=1000.0, max_participations=1))
    ledger.begin_run("a", run)
    train(ledger, 2)


def test_a_second_run_is_never_admitted_by_prv(path):
    ledger = opened(path, epsilon=1.0)
    ledger.begin_run("a", terms("r0", noise_multiplier=1000.0, max_participations=1))
    assert not ledger.fits("a", sole())
    train(ledger, 1, "r0")
    ledger.end_run("a", "r0")
    assert not ledger.fits("a", sole())


def test_a_sole_run_of_which_nothing_was_read_has_closed_nothing(path):
    ledger = opened(path, epsilon=1.0)
    ledger.begin_run("a", sole())
    ledger.reserve("a", "r1", 1, 0).void()
    ledger.end_run("a", "r1")
    assert ledger.lifetime("a").remaining == 1.0
    assert ledger.fits("a", sole(run_id="r2"))


def test_unfinished_runs_hold_their_maximum_until_they_end_or_their_process_does(path):
    first, second = opened(path, epsilon=2.0), opened(path, epsilon=2.0)
    run = terms(noise_multiplier=8.0, max_participations=4)
    other = dataclasses.replace(run, run_id="r2")
    first.begin_run("a", run)
    assert not second.fits("a", other)
    with pytest.raises(BudgetExhausted, match=r"limit 2 .*spent 0.*policy\.toml"):
        second.begin_run("a", other)
    with pytest.raises(LedgerError, match="held by another process"):
        second.begin_run("a", run)
    train(first, 1)
    first.close()
    second.begin_run("a", other)
    third = opened(path, epsilon=2.0)
    with pytest.raises(BudgetExhausted):
        third.begin_run("a", run)
    second.end_run("a", "r2")
    third.begin_run("a", run)
    assert [charge.run_id for charge in third.charges()] == ["r1"]


def test_a_run_that_goes_on_after_a_restart_keeps_its_charges_and_its_maximum(path):
    ledger = opened(path)
    ledger.begin_run("a", terms(max_participations=2))
    train(ledger, 1)
    ledger.close()
    again = opened(path)
    again.begin_run("a", terms(max_participations=2))
    train(again, 2)
    with pytest.raises(BudgetExhausted):
        again.reserve("a", "r1", 3, 0)


def test_two_processes_at_once_cannot_both_spend_one_budget(path):
    opened(path, epsilon=2.0).close()
    run = terms(noise_multiplier=7.0, max_participations=3)
    assert filter_epsilon([run.spends(3)], DELTA, FILTER_ORDERS) <= 2 < filter_epsilon([run.spends(6)], DELTA,
                                                                                       FILTER_ORDERS)
    go, start = os.pipe()

    def work(name):
        os.close(start)
        os.read(go, 1)  # all at once: the parent closes its end
        ledger = opened(path, epsilon=2.0)
        for round in range(5):
            try:
                ledger.begin_run("a", dataclasses.replace(run, run_id=name))
                train(ledger, round, name)
            except BudgetExhausted:
                pass

    pids = [forked(lambda name=name: work(name)) for name in ("r1", "r2", "r3", "r4")]
    os.close(go)
    os.close(start)
    assert [ended(pid) for pid in pids] == [0] * 4
    ledger = opened(path, epsilon=2.0)
    spent = gaussian_epsilon([(7.0, charge.steps) for charge in ledger.charges()])
    assert 0 < spent <= ledger.lifetime("a").spent <= 2.0
    assert len(ledger.charges()) >= 3


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


def test_a_shared_record_makes_two_datasets_pay_for_each_other_unless_they_are_declared_distinct(path):
    ledger = opened(path, epsilon=2.0)
    ledger.register("a", [b"x" * 16, b"y" * 16])
    ledger.register("b", [b"z" * 16])
    ledger.declare("b", epsilon=100.0, delta=DELTA)
    assert ledger.overlapping("a") == ledger.overlapping("b") == ()
    ledger.register("b", [b"y" * 16, b"z" * 16])
    assert ledger.overlapping("a") == ("b",) and ledger.overlapping("b") == ("a",)
    big = terms("r2", noise_multiplier=10.0)
    assert not ledger.fits("b", dataclasses.replace(big, noise_multiplier=2.0)), "the lifetime of a counts for b too"
    ledger.begin_run("b", big)
    train(ledger, 1, "r2", "b")
    assert ledger.lifetime("a").spent >= gaussian_epsilon([(10.0, 2)])
    assert not ledger.fits("a", terms(noise_multiplier=10.0))
    ledger.declare("b", epsilon=100.0, delta=DELTA, distinct=["a"])
    assert ledger.overlapping("a") == () and ledger.lifetime("a").spent == 0
    assert opened(path, epsilon=2.0).lifetime("b").declared[-1].distinct == ("a",)


def test_a_raised_lifetime_takes_effect_and_is_recorded_for_ever(path):
    ledger = opened(path, epsilon=1.0)
    ledger.begin_run("a", sole())
    train(ledger, 1)
    ledger.end_run("a", "r1")
    assert not ledger.fits("a", terms("r2", noise_multiplier=100.0))
    ledger.declare("a", epsilon=3.0, delta=DELTA)
    assert ledger.fits("a", terms("r2", noise_multiplier=100.0))
    assert ledger.lifetime("a").closed_by is None
    assert [(d.epsilon, d.delta) for d in opened(path, epsilon=3.0).lifetime("a").declared] == [(1.0, DELTA),
                                                                                              (3.0, DELTA)]


def test_a_lowered_lifetime_stops_a_run_that_no_longer_fits(path):
    ledger = opened(path, epsilon=8.0)
    ledger.begin_run("a", terms(noise_multiplier=5.0))
    train(ledger, 1)
    ledger.declare("a", epsilon=0.5, delta=DELTA)
    with pytest.raises(BudgetExhausted):
        ledger.reserve("a", "r1", 2, 0)


def test_a_clock_that_jumps_changes_nothing_but_the_recorded_times(path):
    now = [1e9]
    ledger = opened(path, clock=lambda: now[0])
    ledger.begin_run("a", terms())
    for round, now[0] in enumerate([5e9, -1.0, 0.0], start=1):
        train(ledger, round)
    again = opened(path)
    assert [(c.round, c.time) for c in again.charges()] == [(1, 5e9), (2, -1.0), (3, 0.0)]


# A full disk


def test_on_a_full_disk_nothing_is_trained_and_nothing_leaves(path):
    ledger = opened(path)
    ledger.begin_run("a", terms())
    stored = ledger.reserve("a", "r1", 1, 0)
    stored.begin()
    stored.stored(SHA)
    voided = ledger.reserve("a", "r1", 2, 0)
    with full_disk():
        with pytest.raises(LedgerError, match=r"nothing may be trained.*see to the disk"):
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


# Tampering and loss


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
    "a hash changed": "UPDATE events SET sha256 = 'f' || substr(sha256, 2) WHERE sequence = 4",
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


def test_a_rehashed_chain_contradicts_the_witness(used):
    """Someone who recomputes every hash has made another ledger, and the witness knows."""
    from fedlora.privacy.ledger.lifetime import chained

    db = sqlite3.connect(used)
    head = ""
    for sequence, event in db.execute("SELECT sequence, event FROM events ORDER BY sequence").fetchall():
        event = event.replace('"noise_multiplier":20.0', '"noise_multiplier":40.0')
        head = chained(head, event)
        db.execute("UPDATE events SET event = ?, sha256 = ? WHERE sequence = ?", (event, head, sequence))
    db.commit()
    db.close()
    with pytest.raises(LedgerError, match="does not hold"):
        opened(used)


def test_an_older_copy_of_the_ledger_is_an_error(used, tmp_path):
    shutil.copy(used, tmp_path / "backup")
    ledger = opened(used)
    ledger.begin_run("a", terms())
    train(ledger, 3)
    ledger.close()
    shutil.copy(tmp_path / "backup", used)
    with pytest.raises(LedgerError, match=r"has seen \d+ rows.*older copy.*--new-ledger"):
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


def test_a_new_ledger_is_explicit_keeps_the_old_one_and_leaves_its_mark_for_ever(used):
    old = opened(used)
    old.begin_run("a", terms())
    with pytest.raises(LedgerError, match="in use"):
        Ledger(used, new=True)
    assert not old.created_anew
    old.close()
    new = opened(used, new=True)
    assert new.created_anew and new.ledger_id != old.ledger_id and new.charges() == ()
    [mark] = new.marks()
    assert mark["ledger_id"] == old.ledger_id and mark["dataset"] == "a" and mark["rows"] > 0
    new.close()
    again = opened(used)
    assert again.created_anew and len(again.marks()) == 1
    assert len(Ledger(used.with_name(used.name + ".replaced-1")).charges()) == 2


def test_a_new_ledger_helps_where_the_old_one_and_the_witness_are_unreadable(used):
    used.write_bytes(b"damaged" * 1000)
    witness_of(used.parent).write_text("damaged")
    with pytest.raises(LedgerError):
        opened(used)
    new = opened(used, new=True)
    assert [mark["ledger_id"] for mark in new.marks()] == ["unreadable"]
    new.close()
    opened(used)


# Kinds and places


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
    monkeypatch.setattr("fedlora.privacy.ledger.chain.network_file_system", lambda place: "nfs4")
    with pytest.raises(LedgerError, match=r"network file system.*nfs4.*local disk"):
        Ledger(path)
    Ledger(path, simulated=True)


def test_run_terms_are_what_is_agreed():
    assert [field.name for field in dataclasses.fields(RunTerms)] == [
        "run_id", "plan_sha256", "unit", "declared_size", "sampling_rate", "noise_multiplier", "delta", "clip_norm",
        "scales", "local_steps", "max_participations", "group_size"]
