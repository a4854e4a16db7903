"""Tests of accounting against independent figures, and of calibration against accounting."""

import math

import pytest
from opacus.accountants import PRVAccountant

from fedlora.privacy import accounting
from fedlora.privacy.accounting import (
    SIGMA_STEP,
    Accountant,
    Budget,
    Spend,
    _epsilon,
    calibrate,
    nominal_size,
    prv_epsilon,
)
from fedlora.privacy.spend import rdp_epsilon

# sigma, q, steps, epsilon by dp-accounting's PLD at delta = 1e-5, epsilon by RDP
PUBLISHED = [(1.0, 0.01, 500, 1.326, 1.653), (0.8, 0.02, 1000, 6.419, 7.201), (1.0, 0.01, 1, 0.199, math.inf)]


@pytest.mark.parametrize(("sigma", "q", "steps", "pld", "rdp"), PUBLISHED)
def test_epsilon_is_above_the_numerical_one_by_at_most_its_error_and_below_rdp(sigma, q, steps, pld, rdp):
    accountant = Accountant()
    accountant.add(sigma, q, steps)
    assert pld <= accountant.epsilon(1e-5) <= min(pld + 0.02, rdp)


def test_where_epsilon_is_large_prv_is_not_asked_and_rdp_counts():
    history = (Spend(0.5, 0.5, 1000),)
    assert 100 < Accountant(history).epsilon(1e-5) == rdp_epsilon(history, 1e-5) < math.inf


def test_rdp_counts_where_delta_is_so_small_that_prv_fails():
    history = (Spend(1.0, 0.01, 500),)
    opacus = PRVAccountant()
    opacus.history = [(1.0, 0.01, 500)]
    with pytest.raises(ValueError, match="small values of delta"):
        opacus.get_epsilon(1e-14)
    assert prv_epsilon(history, 1e-14) is None
    assert 3 < Accountant(history).epsilon(1e-14) == rdp_epsilon(history, 1e-14) < math.inf
    assert Accountant((Spend(calibrate(8.0, 1e-14, 0.01, 500), 0.01, 500),)).epsilon(1e-14) <= 8


@pytest.mark.parametrize("answer", [math.inf, math.nan, -1.0, ValueError(), RuntimeError(), IndexError()], ids=repr)
def test_rdp_counts_where_prv_is_asked_and_has_no_finite_answer(answer, monkeypatch):
    asked = []

    def get_epsilon(self, delta):
        asked.append(self.history)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(PRVAccountant, "get_epsilon", get_epsilon)
    history = (Spend(1.0, 0.0123, 45),)
    for cached in (prv_epsilon, _epsilon):
        monkeypatch.setattr(accounting, cached.__name__, cached.__wrapped__)
    assert 0 < Accountant(history).epsilon(1e-5) == rdp_epsilon(history, 1e-5) < math.inf
    assert asked == [[(1.0, 0.0123, 45)]]


def test_nothing_released_costs_nothing():
    assert Accountant().epsilon(1e-5) == 0


def test_steps_of_different_rounds_add_up_to_one_release():
    rounds, whole = Accountant(), Accountant((Spend(1.0, 0.01, 500),))
    for _ in range(50):
        rounds.add(1.0, 0.01, 10)
    assert rounds.history == whole.history == (Spend(1.0, 0.01, 500),)


def test_heterogeneous_history_costs_more_than_each_of_its_parts():
    both = Accountant((Spend(1.0, 0.01, 500), Spend(0.8, 0.02, 100))).epsilon(1e-5)
    assert both > max(Accountant((Spend(1.0, 0.01, 500),)).epsilon(1e-5),
                      Accountant((Spend(0.8, 0.02, 100),)).epsilon(1e-5))


@pytest.mark.parametrize(("epsilon", "delta", "q", "steps"), [(8.0, 1e-5, 0.05, 100), (1.0, 1e-6, 0.01, 40),
                                                              (0.1, 1e-5, 0.2, 1), (30.0, 1e-5, 0.1, 10)])
def test_calibrated_noise_meets_the_budget_and_a_little_less_does_not(epsilon, delta, q, steps):
    sigma = calibrate(epsilon, delta, q, steps)
    assert Accountant((Spend(sigma, q, steps),)).epsilon(delta) <= epsilon
    assert Accountant((Spend(sigma - 2 * SIGMA_STEP, q, steps),)).epsilon(delta) > epsilon


def test_declared_size_rounds_down_to_two_significant_digits():
    assert [nominal_size(n) for n in (7, 99, 100, 109, 14_812, 9_999)] == [7, 99, 100, 100, 14_000, 9_900]


def test_budget_depends_on_the_declared_size_alone():
    assert Budget.declare(14_812, epsilon=8) == Budget.declare(14_001, epsilon=8)
    assert Budget.declare(14_812, epsilon=8).delta == min(1e-5, 0.1 / 14_000)
    assert Budget.declare(50_000, epsilon=8).delta == 0.1 / 50_000
    assert Budget.declare(14_812, epsilon=8).sampling_rate(512) == 512 / 14_000


def test_a_sampling_rate_above_the_limit_is_refused_naming_the_batch_that_fits():
    with pytest.raises(ValueError, match="at most 20 would fit"):
        Budget.declare(100, epsilon=8).sampling_rate(21)
    assert Budget.declare(100, epsilon=8).sampling_rate(20) == 0.2


@pytest.mark.parametrize("values", [{"epsilon": math.inf}, {"epsilon": 0}, {"epsilon": 1, "delta": 0.01},
                                    {"epsilon": 1, "delta": 0}, {"epsilon": 1, "declared_size": 0}])
def test_a_budget_that_promises_nothing_is_refused(values):
    with pytest.raises(ValueError, match="must be"):
        Budget.declare(100, **values)
