"""Tests of what an attacker can achieve: closed forms, the looser bound from epsilon alone, and a simulated attack."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedlora.privacy.accounting import Spend, privacy_loss, prv_epsilon
from fedlora.privacy.trade_off import _GRID, FALSE_ALARMS, attack, suspicion


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 5.0])
def test_one_step_without_sampling_is_the_gaussian_mechanism_whose_trade_off_is_known(sigma):
    """Dong, Roth, Su 2019: f(a) = Phi(Phi^-1(1 - a) - 1/sigma)."""
    most = attack((Spend(sigma, 1.0, 1),))
    assert most.even_odds == pytest.approx(norm.cdf(1 / (2 * sigma)), rel=1e-6)
    for rate, found in zip(FALSE_ALARMS, most.found, strict=True):
        exact = 1 - norm.cdf(norm.ppf(1 - rate) - 1 / sigma)
        assert exact <= found <= exact * 1.001


def test_steps_without_sampling_add_up_to_one_with_less_noise():
    many, one = attack((Spend(8.0, 1.0, 16),)), attack((Spend(2.0, 1.0, 1),))
    assert many.even_odds == pytest.approx(one.even_odds, rel=1e-3)
    assert many.found == pytest.approx(one.found, rel=1e-3)


@pytest.mark.parametrize(("sigma", "q", "steps"), [
    (1.0, 0.01, 500), (0.8, 0.1, 40), (0.3, 0.05, 10), (20.0, 0.001, 1), (0.6, 0.03, 160), (0.5, 1.0, 1)])
def test_the_search_finds_the_least_bound_of_the_whole_grid(sigma, q, steps):
    history = (Spend(sigma, q, steps),)
    deltas = np.array(privacy_loss(history).get_delta_for_epsilon(_GRID))
    for rate, found in zip(FALSE_ALARMS, attack(history).found, strict=True):
        least = np.minimum(deltas + np.exp(_GRID) * rate, 1 - np.exp(-_GRID) * (1 - deltas - rate)).min()
        assert found == pytest.approx(min(1.0, least), abs=1e-12)
    assert attack(history).even_odds == pytest.approx(min(1.0, (1 + deltas[0]) / 2), abs=1e-12)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 500), (1.3, 0.02, 2000), (0.8, 0.1, 40)])
def test_the_bounds_are_tighter_than_those_that_follow_from_epsilon_and_delta_alone(sigma, q, steps):
    history = (Spend(sigma, q, steps),)
    most, delta = attack(history), 1e-5
    epsilon = prv_epsilon(history, delta)
    assert most.even_odds < (math.exp(epsilon) + delta) / (1 + math.exp(epsilon)) - 0.05
    assert most.even_odds < math.exp(epsilon) / (1 + math.exp(epsilon)) - 0.05
    for rate, found in zip(FALSE_ALARMS, most.found, strict=True):
        assert rate < found < 0.8 * (math.exp(epsilon) * rate + delta)


def test_no_attack_on_simulated_releases_is_better_than_the_bound_and_the_best_one_comes_close():
    """The likelihood ratio is the best test. The unit's gradient has the clip norm 1, in one dimension."""
    sigma, q, steps, tries = 1.0, 0.1, 20, 200_000
    random = np.random.default_rng(0)
    scores = []
    for inside in (0.0, 1.0):
        score = np.zeros(tries)
        for _ in range(steps):
            seen = random.normal(0, sigma, tries) + inside * (random.random(tries) < q)
            score += np.log1p(q * np.expm1((2 * seen - 1) / (2 * sigma**2)))
        scores.append(score)
    most = attack((Spend(sigma, q, steps),))
    right = (np.mean(scores[0] <= 0) + np.mean(scores[1] > 0)) / 2
    assert most.even_odds - 0.005 < right < most.even_odds + 0.003
    for rate, found in zip(FALSE_ALARMS, most.found, strict=True):
        hit = np.mean(scores[1] > np.quantile(scores[0], 1 - rate))
        assert 0.9 * found < hit < 1.1 * found


def test_nothing_released_leaves_guessing_and_hardly_any_noise_leaves_no_bound():
    assert attack(()).even_odds == 0.5 and attack(()).found == FALSE_ALARMS
    assert attack((Spend(0.05, 1.0, 10),)) is None


def test_more_steps_never_help_the_owner():
    ones = [attack((Spend(1.0, 0.05, steps),)) for steps in (1, 10, 100)]
    assert [one.even_odds for one in ones] == sorted(one.even_odds for one in ones)
    assert all(late > early for early, late in zip(ones[0].found, ones[2].found, strict=True))


def test_a_suspicion_follows_bayes_rule():
    assert suspicion(0.01, 0.01, 0.01) == pytest.approx(0.01)
    assert suspicion(0.5, 0.9, 0.1) == pytest.approx(0.9)
    assert suspicion(0.01, 1.0, 0.001) == pytest.approx(0.01 / (0.01 + 0.99 * 0.001))
