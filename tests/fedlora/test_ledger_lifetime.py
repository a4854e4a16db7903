"""Tests of the lifetime budget: epsilon on record is never below epsilon spent, and never above the limit."""

import dataclasses
import os
import shutil
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.privacy import Accountant
from fedlora.privacy.ledger import BudgetExhausted, Ledger, LedgerError
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS, filter_epsilon
from fedlora.privacy.spend import RDP_ORDERS, rdp, rdp_epsilon

from .ledgers import DELTA, SHA, ended, forked, full_disk, gaussian_epsilon, opened, terms, train, witness_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "ledger.sqlite"


# A property of any sequence of the things that can happen to two processes with one ledger file


RUNS = {(dataset, f"{dataset}{i}"): terms(f"{dataset}{i}", noise_multiplier=sigma, max_participations=most)
        for dataset in "abc" for i, (sigma, most) in enumerate([(20.0, 5), (10.0, 3), (6.0, 2)])}
PAYS = {"a": "ab", "b": "ab", "c": "c"}


class World:
    """Two processes with one ledger, and the truth about what was read.

    The data sets `a` and `b` share a record. `c` shares one with `a`, but is declared distinct.
    """

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


# The filter, several runs at the same time, and data sets that share records


def test_the_filter_bounds_the_exact_epsilon_and_shares_delta_among_its_orders():
    for sigma, steps in ((20.0, 10), (3.0, 4), (100.0, 1000)):
        spends = terms(noise_multiplier=sigma, local_steps=steps).spends(1)
        ours = filter_epsilon([spends], DELTA, FILTER_ORDERS)
        best = filter_epsilon([spends], DELTA * len(RDP_ORDERS), RDP_ORDERS)
        assert gaussian_epsilon([(sigma, steps)]) < best < ours < 1.25 * best
        assert best == pytest.approx(rdp_epsilon(spends, DELTA), rel=0.02)
    assert filter_epsilon([], DELTA, FILTER_ORDERS) == 0
    assert np.isinf(rdp(terms(noise_multiplier=1e-200).spends(1)[0], (2,))).all()


def sole(**changes):
    """Return terms of a run that fits epsilon = 1 by PRV but not by the filter."""
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


def test_a_limit_that_is_lowered_while_a_run_lasts_is_closed_by_it(path):
    ledger, run = opened(path, epsilon=10.0), sole()
    ledger.begin_run("a", run)
    assert ledger.lifetime("a").closed_by is None
    ledger.declare("a", epsilon=1.0, delta=DELTA, witness=witness_of(path.parent, "a"))
    train(ledger, 1)
    ledger.end_run("a", "r1")
    assert ledger.lifetime("a").closed_by == "r1"
    with pytest.raises(BudgetExhausted, match="closed by run r1"):
        ledger.begin_run("a", terms("r2", noise_multiplier=1000.0, max_participations=1))


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
        os.read(go, 1)  # returns when the parent closes its end, so that all begin at once
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
    assert ledger.distinct("a") == ("b",) and ledger.distinct("b") == ("a",), "the reports of both name it"
    assert opened(path, epsilon=2.0).lifetime("b").declared[-1].distinct == ("a",)


PATIENT = "column:patient_id"


@pytest.mark.parametrize(("spent", "asked"), [("row", PATIENT), (PATIENT, "row"), (PATIENT, "column:visit")])
@pytest.mark.parametrize("copy", [False, True])
def test_runs_that_protect_different_units_never_share_a_budget(path, spent, asked, copy):
    ledger = opened(path, epsilon=100.0)
    ledger.register("a", [b"x" * 16])
    ledger.register("b", [b"x" * 16])
    ledger.declare("a", epsilon=100.0, delta=DELTA, unit=spent)
    ledger.begin_run("a", terms(unit=spent))
    train(ledger, 1)
    ledger.end_run("a", "r1")
    dataset = "b" if copy else "a"
    ledger.declare(dataset, epsilon=100.0, delta=DELTA, unit=asked)  # as after an edit of policy.toml
    other = terms("r2", noise_multiplier=1000.0, unit=asked)
    assert not ledger.fits(dataset, other)
    with pytest.raises(BudgetExhausted, match=f"budget of 'a' protects .*--privacy-unit {spent}"):
        ledger.begin_run(dataset, other)
    if copy:
        ledger.declare("b", epsilon=100.0, delta=DELTA, unit=asked, distinct=["a"])
        ledger.begin_run("b", other)


def test_a_copy_by_rows_cannot_spend_a_budget_of_patients_that_nobody_has_used_yet(path):
    ledger = opened(path)
    ledger.declare("a", epsilon=8.0, delta=DELTA, unit=PATIENT)
    ledger.register("a", [b"x" * 16])
    ledger.register("b", [b"x" * 16])
    with pytest.raises(BudgetExhausted, match="rows that share a value of 'patient_id'"):
        ledger.begin_run("b", terms(noise_multiplier=1000.0))
    assert [d.unit for d in ledger.lifetime("a").declared] == ["row", PATIENT]


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
