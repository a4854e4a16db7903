"""Contract tests for privacy mechanisms: they run on every mechanism that is installed."""

from __future__ import annotations

import dataclasses

import pytest
from dp_accounting.pld import PLDAccountant

from fedlora import registry
from fedlora.privacy import Accountant, Budget, RunTerms
from fedlora.privacy.mechanisms import PACKAGE, Noise, mechanism_named
from tests.fedlora.test_plan import make_plan

KEYS = registry.keys(PACKAGE)
BUDGET = Budget(3.0, 1e-5, 5000)


def plan_of(key, **changes):
    shared = {} if key == "dp-sgd" else {"least_members": 6, "colluding": 1}
    return make_plan(**{"private": True, "rounds": 60, "max_participations": 60, "expected_batch": 150,
                        "local_steps": 1, "optimizer": "sgd", "clip_norm": 2.0, "mechanism": key} | shared | changes)


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


def test_a_mechanism_that_is_not_installed_is_refused_by_name():
    with pytest.raises(ValueError, match="'telepathy' is not among the mechanisms installed here"):
        mechanism_named("telepathy")
