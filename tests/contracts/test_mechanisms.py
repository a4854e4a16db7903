"""Contract tests for privacy mechanisms: they run on every mechanism that is installed."""

from __future__ import annotations

import dataclasses

import pytest
from dp_accounting.pld import PLDAccountant

from fedlora import registry
from fedlora.plan import AGGREGATE, LOCAL, from_scalars, plan_digest, to_scalars
from fedlora.privacy import Accountant, Budget, RunTerms
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanisms import PACKAGE, Noise, mechanism_named
from fedlora.privacy.report import (
    LifetimeAccount,
    LifetimeCharge,
    Mechanism,
    ReportedRun,
    Sums,
    TrainingEntry,
    privacy_report,
    sign,
    verify,
)
from fedlora_client.terms import Limits, private_terms
from tests.fedlora.ledgers import opened, train
from tests.fedlora.test_plan import make_plan
from tests.fedlora.test_privacy_report import KEY, changed

KEYS = registry.keys(PACKAGE)
BUDGET = Budget(3.0, 1e-5, 5000)


def plan_of(key, **changes):
    shared = {"least_members": 6, "colluding": 1} if key == AGGREGATE else {}
    return make_plan(**{"private": True, "rounds": 60, "max_participations": 60, "expected_batch": 150,
                        "local_steps": 1, "optimizer": "sgd", "clip_norm": 2.0, "mechanism": key} | shared | changes)


def reported(ledger, terms, plan):
    """Return the report that a client makes from the ledger of data set "a" if its own noise is charged."""
    run, spent = plan.run_id, ledger.lifetime("a")
    return privacy_report(ReportedRun(
        "a", run, "north", "127.0.0.1:9092", "cd" * 32, plan.strategy, {"name": "tiny"}, "row", terms.declared_size,
        terms.delta,
        Mechanism(terms.noise_multiplier, terms.sampling_rate, plan.expected_batch, terms.local_steps,
                  terms.max_participations, terms.clip_norm, terms.scales, rows={8: 32}, key=terms.mechanism),
        [TrainingEntry(one.round, one.attempt, one.state, one.steps, one.time, terms.noise_multiplier,
                       terms.sampling_rate) for one in ledger.charges("a", run)],
        LifetimeAccount(spent.epsilon, spent.delta, [LifetimeCharge(
            "a", run, one.noise_multiplier, one.sampling_rate, one.steps) for one in ledger.history("a", run)]),
        [], sums=Sums(None, terms.least_members, terms.colluding, []) if plan.secure_aggregation else None))


@pytest.fixture(params=KEYS)
def key(request):
    return request.param


@pytest.mark.parametrize("relied", [None, 6])
def test_all_trainings_of_a_run_keep_its_budget_and_less_noise_would_not(key, relied):
    mechanism, plan = mechanism_named(key), plan_of(key)
    noise = mechanism.calibrate(BUDGET, plan, plan.clip_norm, relied)
    rate, delta = BUDGET.sampling_rate(plan.expected_batch), mechanism.steps_delta(noise, BUDGET.delta)
    assert delta <= BUDGET.delta

    def epsilon(spent):
        return Accountant(mechanism.spends(spent, rate, plan.most_trainings)).epsilon(delta)

    assert epsilon(noise) <= BUDGET.epsilon
    less = noise.charged - 1e-3
    assert epsilon(Noise(less, None if noise.aggregate is None else less)) > BUDGET.epsilon


def test_a_mechanism_charges_what_its_event_costs_by_dp_accountings_own_accountant(key):
    mechanism, plan = mechanism_named(key), plan_of(key)
    noise = mechanism.calibrate(BUDGET, plan, plan.clip_norm)
    rate = BUDGET.sampling_rate(plan.expected_batch)
    charged = Accountant(mechanism.spends(noise, rate, 60)).epsilon(BUDGET.delta)
    independent = PLDAccountant().compose(mechanism.event(noise, rate, 60)).get_epsilon(BUDGET.delta)
    assert independent - 1e-3 <= charged <= independent + 0.03
    assert mechanism.spends(noise, rate, 0) == ()


def test_raised_noise_is_charged_as_it_was_asked_for_and_its_own_part_grows_with_it(key):
    mechanism, plan = mechanism_named(key), plan_of(key)
    for relied in (None, 6):
        noise = mechanism.calibrate(BUDGET, plan, plan.clip_norm, relied)
        raised = mechanism.raised(noise, 2 * noise.charged)
        assert raised.charged == 2 * noise.charged and raised.own >= 2 * noise.own
        assert (raised.aggregate is None) == (noise.aggregate is None)


def test_a_mechanism_says_in_two_sentences_what_its_noise_promises_and_stores_what_terms_have(key):
    mechanism = mechanism_named(key)
    assert mechanism.promise.count(". ") == 1 and mechanism.promise.endswith(".")
    assert set(mechanism.stores) <= {field.name for field in dataclasses.fields(RunTerms)}


def test_a_run_of_a_mechanism_goes_from_the_plan_to_the_ledger_which_charges_what_the_mechanism_says(key, tmp_path):
    plan, mechanism = plan_of(key), mechanism_named(key)
    assert from_scalars(to_scalars(plan)) == plan and to_scalars(plan)["mechanism"] == key
    terms = private_terms(Limits(BUDGET.epsilon), BUDGET, plan, plan_digest(plan))
    ledger = opened(tmp_path / "ledger.sqlite", epsilon=20.0)
    ledger.begin_run("a", terms)
    for round in (1, 2):
        train(ledger, round, plan.run_id)
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert again.terms("a", plan.run_id) == terms and terms.mechanism == key
    charged = mechanism.spends(terms.noise, BUDGET.sampling_rate(plan.expected_batch), 2)
    delta = mechanism.steps_delta(terms.noise, BUDGET.delta)
    assert again.history("a", plan.run_id) == charged
    assert again.epsilon("a", plan.run_id) == Accountant(charged).epsilon(delta)
    again.close()


def test_the_report_of_a_run_states_what_its_ledger_charges_and_verifies(key, tmp_path):
    plan = plan_of(key)
    terms = private_terms(Limits(BUDGET.epsilon), BUDGET, plan, plan_digest(plan))
    ledger = opened(tmp_path / "ledger.sqlite", epsilon=20.0)
    ledger.begin_run("a", terms)
    for round in (1, 2):
        train(ledger, round, plan.run_id)
    report = reported(ledger, terms, plan)
    verified = verify(sign(report, KEY))
    assert verified.epsilon == terms.epsilon(terms.max_participations) <= BUDGET.epsilon
    assert verified.spent == ledger.epsilon("a", plan.run_id)
    assert report["lifetime"]["spent"] == ledger.lifetime("a").spent
    ledger.close()
    event = mechanism_named(key).event(terms.noise, terms.sampling_rate, plan.most_trainings)
    assert report["mechanism"]["key"] == key and report["mechanism"]["event"] == repr(event)
    lower = [changed(report, ("lifetime", "spent"), 0.999 * report["lifetime"]["spent"])]
    for kind in ("guarantee", "spent"):
        stated = report["privacy"][kind]
        less = changed(report, ("privacy", kind, "epsilon"), 0.999 * stated["epsilon"])
        lower.append(changed(less, ("privacy", kind, "accountants", stated["accountant"]), 0.999 * stated["epsilon"]))
    for embellished in lower:
        with pytest.raises(ValueError, match="own history amounts to"):
            verify(sign(embellished, KEY))


def test_terms_are_stored_with_the_fields_of_their_own_mechanism_alone(key):
    stored = private_terms(Limits(BUDGET.epsilon), BUDGET, plan_of(key)).stored()
    for other in KEYS:
        for field in mechanism_named(other).stores:
            assert (field in stored) == (field in mechanism_named(key).stores)


def test_a_plan_of_a_protocol_that_has_no_field_for_the_mechanism_is_that_of_dp_sgd(key):
    if key == LOCAL:
        assert "mechanism" not in to_scalars(plan_of(key, protocol=7))
    else:
        with pytest.raises(ValueError, match=r"^protocol is 7"):
            plan_of(key, protocol=7)


def test_a_mechanism_that_is_not_installed_is_refused_by_name():
    with pytest.raises(ValueError, match="'telepathy' is not among the mechanisms installed here"):
        mechanism_named("telepathy")
    with pytest.raises(ValueError, match=f"mechanism is 'telepathy'; choose one of {', '.join(KEYS)}"):
        make_plan(mechanism="telepathy")
