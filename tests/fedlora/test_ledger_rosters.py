"""The ledger keeps the rosters of a run's secure sums, and charges sums only where a roster promises what they cost."""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import replace

import pytest

from fedlora.privacy import Accountant, Ledger, LedgerError, RosterFacts, RunTerms
from fedlora.privacy.ledger.lifetime_budget import filter_epsilon
from fedlora.privacy.spend import Spend

from .ledgers import terms as dp_sgd_terms
from .test_ledger_witness import rehash

DELTA, RATE, ROUNDS = 1e-5, 0.03, 80
SIX = RosterFacts("ab" * 32, 6, 1, 1.2, 4000.0, 2.0**-14, 1.0, 10_000, True)


def terms(run_id="r1", **changes):
    return RunTerms(**{"run_id": run_id, "plan_sha256": "a" * 64, "unit": "row", "declared_size": 5000,
                       "sampling_rate": RATE, "noise_multiplier": 0.6, "delta": DELTA, "clip_norm": 1.0,
                       "scales": {"adapter": 1.0}, "local_steps": 1, "max_participations": ROUNDS,
                       "mechanism": "distributed-gaussian", "least_members": 6, "colluding": 1} | changes)


SUMS = terms(aggregate_noise_multiplier=1.2)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def events(path):
    with sqlite3.connect(path) as db:
        return [json.loads(event) for event, in db.execute("SELECT event FROM events ORDER BY sequence")]


def test_a_roster_is_noted_once_and_is_there_after_a_restart(ledger):
    ledger.begin_run("north", terms())
    other = replace(SIX, digest="cd" * 32, members=7, colluding=1)
    for roster in (SIX, other, SIX):
        ledger.note_roster("north", "r1", roster)
    assert ledger.rosters("north", "r1") == (SIX, other)
    assert [event["kind"] for event in events(ledger.path)].count("roster") == 2
    ledger.close()
    again = Ledger(ledger.path)
    assert again.rosters("north", "r1") == (SIX, other) and again.rosters("north", "r2") == ()
    again.close()


def test_a_roster_with_other_facts_by_the_same_digest_is_refused(ledger):
    ledger.begin_run("north", terms())
    ledger.note_roster("north", "r1", SIX)
    with pytest.raises(LedgerError, match="other facts"):
        ledger.note_roster("north", "r1", replace(SIX, pinned=False))
    with pytest.raises(LedgerError, match="not held by this process"):
        ledger.note_roster("north", "r2", SIX)


@pytest.mark.parametrize(("change", "why"), [
    ({"pinned": False}, "does not name the keys"), ({"noise_multiplier": 1.19}, "add noise of 1.19"),
    ({"members": 5}, "has 5 members, and the charge relies on 6"),
    ({"deviation": 2.0}, "give a lower --epsilon")], ids=["pins", "noise", "members", "grid"])
def test_nothing_is_trained_under_a_roster_that_lacks_what_is_charged(ledger, change, why):
    ledger.begin_run("north", SUMS)
    with pytest.raises(LedgerError, match=why):
        ledger.note_roster("north", "r1", replace(SIX, **change))
    with pytest.raises(LedgerError, match="no roster of members was noted"):
        ledger.reserve("north", "r1", 1, 0)
    ledger.note_roster("north", "r1", SIX)
    ledger.reserve("north", "r1", 1, 0).begin()
    assert len(ledger.charges("north", "r1")) == 1


def test_own_noise_is_charged_under_any_roster(ledger):
    ledger.begin_run("north", terms())
    ledger.note_roster("north", "r1", replace(SIX, pinned=False, noise_multiplier=0.1))
    ledger.reserve("north", "r1", 1, 0).begin()
    assert ledger.epsilon("north", "r1") == Accountant((Spend(0.6, RATE, 1),)).epsilon(DELTA)


def test_the_noise_of_sums_is_charged_at_a_hundredth_less_of_delta_and_the_rest_is_for_rounding(ledger):
    ledger.declare("north", epsilon=8.0, delta=DELTA)
    ledger.begin_run("north", SUMS)
    ledger.note_roster("north", "r1", SIX)
    for number in range(3):
        ledger.reserve("north", "r1", number, 0).begin()
    spent = (Spend(1.2, RATE, 3),)
    assert ledger.epsilon("north", "r1") == Accountant(spent).epsilon(0.99 * DELTA)
    orders = ledger.lifetime("north").declared[-1].orders
    assert ledger.lifetime("north").spent == filter_epsilon([spent], 0.99 * DELTA, orders)
    assert SUMS.own().epsilon(3) == Accountant((Spend(0.6, RATE, 3),)).epsilon(DELTA)


def test_a_run_that_closes_a_budget_by_its_sums_fits_at_what_is_left_of_delta(ledger):
    limit = SUMS.epsilon(ROUNDS)
    ledger.declare("north", epsilon=limit * (1 - 1e-6), delta=DELTA)
    assert not ledger.fits("north", SUMS)
    ledger.declare("north", epsilon=limit * (1 + 1e-6), delta=DELTA)
    assert ledger.fits("north", SUMS)


def test_rounding_in_several_runs_must_leave_what_is_set_aside_of_the_lifetimes_delta(ledger):
    coarse = replace(SIX, deviation=330.0)  # enough for each run, not for both at the ε of both together
    ledger.declare("north", epsilon=50.0, delta=DELTA)
    ledger.begin_run("north", SUMS)
    ledger.note_roster("north", "r1", coarse)
    ledger.begin_run("north", replace(SUMS, run_id="r2"))
    with pytest.raises(LedgerError, match="rounding to the grid of secure sums would add"):
        ledger.note_roster("north", "r2", coarse)
    assert ledger.rosters("north", "r2") == ()
    with pytest.raises(LedgerError, match="rounding to the grid of secure sums would add"):
        ledger.reserve("north", "r1", 1, 0)
    ledger.end_run("north", "r2")
    ledger.reserve("north", "r1", 1, 0).begin()


def test_a_run_of_dp_sgd_is_stored_as_before_so_that_older_versions_read_it(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.begin_run("a", dp_sgd_terms())
    [stored] = [event["body"]["terms"] for event in events(ledger.path) if event["kind"] == "run"]
    assert set(stored) == {"run_id", "plan_sha256", "unit", "declared_size", "sampling_rate", "noise_multiplier",
                           "delta", "clip_norm", "scales", "local_steps", "max_participations", "relation",
                           "accountant"}
    assert ledger.terms("a", "r1") == dp_sgd_terms() and ledger.terms("a", "r1").mechanism == "dp-sgd"
    ledger.close()


def test_a_ledger_of_format_2_is_continued_in_place_with_rosters(tmp_path):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.begin_run("a", dp_sgd_terms())
    ledger.close()
    rehash(path, lambda event: event.replace('"format":3', '"format":2'))
    ledger = Ledger(path)
    ledger.begin_run("north", SUMS)
    ledger.note_roster("north", "r1", SIX)
    ledger.close()
    again = Ledger(path)
    assert again.terms("a", "r1") == dp_sgd_terms() and again.terms("north", "r1") == SUMS
    assert again.rosters("north", "r1") == (SIX,) and events(path)[0]["body"]["format"] == 2
    again.close()


def test_only_a_private_run_with_secure_sums_is_charged_for_them():
    for change in ({"mechanism": "dp-sgd"}, {"noise_multiplier": None, "delta": None}):
        with pytest.raises(ValueError, match="aggregate_noise_multiplier"):
            terms(aggregate_noise_multiplier=1.2, **change)
    with pytest.raises(ValueError, match="noise_multiplier"):
        terms(aggregate_noise_multiplier=0.0)


def test_what_can_be_foretold_of_sums_is_the_root_of_the_honest_shares_or_what_is_demanded():
    foretold = terms().sums_epsilon(ROUNDS)
    assert foretold == Accountant((Spend(math.sqrt(4) * 0.6, RATE, ROUNDS),)).epsilon(0.99 * DELTA)
    assert SUMS.sums_epsilon(ROUNDS) == SUMS.epsilon(ROUNDS) and dp_sgd_terms().sums_epsilon(1) is None


@pytest.mark.parametrize("change", [
    {"members": 2}, {"colluding": 2}, {"digest": "x"}, {"noise_multiplier": math.inf}, {"step": 0.0},
    {"deviation": -1.0}, {"values": 0}], ids=lambda change: next(iter(change)))
def test_facts_that_no_roster_can_have_are_refused(change):
    with pytest.raises(ValueError, match="a roster"):
        replace(SIX, **change)
