"""Tests of PRV and RDP against dp-accounting's privacy loss distributions, which share no code with them."""

import math
import random

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from fedlora.privacy.accounting import Spend, pld_epsilon, prv_epsilon
from fedlora.privacy.spend import rdp_epsilon
from tests.covering import WHOLE

GRID = 0.002
"""The most that the grid of `pld_epsilon` adds to epsilon in the range below."""


@pytest.mark.parametrize(("q", "sigma", "steps", "prv", "by_pld", "rdp"), [
    (0.01, 1.0, 500, 1.336, 1.326, 1.653), (0.02, 0.8, 1000, 6.429, 6.419, 7.201), (0.01, 1.0, 1, 0.210, 0.199, None)])
def test_reference_values(q, sigma, steps, prv, by_pld, rdp):
    history = (Spend(sigma, q, steps),)
    assert prv_epsilon(history, 1e-5) == pytest.approx(prv, abs=6e-4)
    assert pld_epsilon(history, 1e-5) == pytest.approx(by_pld, abs=6e-4)
    assert rdp is None or rdp_epsilon(history, 1e-5) == pytest.approx(rdp, abs=6e-4)


def drawn(count):
    """Return `count` random points (q in [.001, .2], sigma in [.6, 4], T <= 5000, epsilon <= 15) and the corners."""
    random_numbers = random.Random(2106)

    def log_uniform(low, high):
        return math.exp(random_numbers.uniform(math.log(low), math.log(high)))

    corners = [(sigma, q, steps) for sigma in (0.6, 4.0) for q in (0.001, 0.2) for steps in (1, 5000)]
    points = [spend for spend in (Spend(*corner) for corner in corners) if rdp_epsilon((spend,), 1e-5) <= 15]
    while len(points) < count:
        spend = Spend(log_uniform(0.6, 4.0), log_uniform(0.001, 0.2), int(log_uniform(1, 5001)))
        if rdp_epsilon((spend,), 1e-5) < 17 and (prv_epsilon((spend,), 1e-5) or 99) <= 15:
            points.append(spend)
    return points


def test_prv_is_within_two_hundredths_or_two_per_cent_of_pld_and_never_below_it():
    points = drawn(102 if WHOLE else 30)
    for spend in points:
        prv, other, rdp = (bound((spend,), 1e-5) for bound in (prv_epsilon, pld_epsilon, rdp_epsilon))
        assert abs(prv - other) <= max(0.02, 0.02 * other), (spend, prv, other)
        assert prv >= other - GRID, (spend, prv, other)
        assert rdp >= other - GRID, (spend, rdp, other)
    assert len(set(points)) == len(points)


@pytest.mark.parametrize(("sigma", "q"), [(3.0, 0.001), (4.0, 0.02), (2.0, 0.01)])
def test_the_grid_of_pld_adds_little(sigma, q):
    fine = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=0.01 * q / sigma)
    assert 0 <= pld_epsilon((Spend(sigma, q, 5000),), 1e-5) - fine.self_compose(5000).get_epsilon_for_delta(1e-5) < GRID


def test_a_mixed_history_is_bounded_by_all_three():
    history = (Spend(1.0, 0.01, 500), Spend(2.0, 0.1, 1), Spend(0.8, 0.02, 100))
    prv, other, rdp = (bound(history, 1e-5) for bound in (prv_epsilon, pld_epsilon, rdp_epsilon))
    assert other - GRID <= prv <= other + 0.02 and prv <= rdp
    assert other > max(pld_epsilon((spend,), 1e-5) for spend in history)
    assert pld_epsilon((), 1e-5) == prv_epsilon((), 1e-5) == rdp_epsilon((), 1e-5) == 0


def test_where_epsilon_is_large_neither_prv_nor_pld_is_asked():
    history = (Spend(0.5, 0.5, 1000),)
    assert prv_epsilon(history, 1e-5) is None and pld_epsilon(history, 1e-5) is None
    assert 100 < rdp_epsilon(history, 1e-5) < math.inf
