"""Tests of the Rényi divergences at many orders: they equal Opacus', dp-accounting's and the defining integral."""

import math
from inspect import signature

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.integrate import quad
from scipy.stats import norm

from fedlora.privacy import renyi
from fedlora.privacy.accounting import Spend, prv_epsilon
from fedlora.privacy.prv import QuickPRVAccountant
from fedlora.privacy.spend import RDP_ORDERS, rdp_epsilon

POINTS = [(sigma, q) for sigma in (0.3, 0.62, 1.0, 4.0) for q in (1e-4, 0.023, 0.2, 0.9)]


@pytest.mark.parametrize(("sigma", "q"), POINTS)
def test_it_is_opacus_divergence_at_every_order(sigma, q):
    theirs = [compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=float(order)) for order in RDP_ORDERS]
    np.testing.assert_allclose(renyi.divergence(sigma, q, RDP_ORDERS), theirs, rtol=1e-11, atol=2e-11)


@pytest.mark.parametrize(("sigma", "q", "alpha"), [(1.0, 0.1, 1.5), (0.8, 0.5, 2.7), (2.0, 0.02, 3.0), (1.5, 0.7, 8.3)])
def test_it_is_the_integral_that_defines_it(sigma, q, alpha):
    def moment(x):
        base = norm.logpdf(x, 0, sigma)
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + norm.logpdf(x, 1, sigma) - base)
        return math.exp(base + alpha * ratio)

    a = quad(moment, -30 * sigma, 30 * sigma + alpha, limit=500, epsabs=0, epsrel=1e-11, points=[0, 1, alpha])[0]
    assert renyi.divergence(sigma, q, (alpha,))[0] == pytest.approx(math.log(a) / (alpha - 1), rel=1e-7)


@pytest.mark.parametrize(("sigma", "q"), POINTS)
def test_epsilon_is_dp_accountings_at_whole_orders_and_no_larger_at_all(sigma, q):
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))

    def theirs(orders):  # at other orders dp-accounting adds up absolute values, which gives an upper bound
        return RdpAccountant(list(orders)).compose(event, 100).get_epsilon(1e-5)

    whole, history = tuple(order for order in RDP_ORDERS if order % 1 == 0), (Spend(sigma, q, 100),)
    assert rdp_epsilon(history, 1e-5, whole) == pytest.approx(theirs(whole), rel=1e-9)
    assert rdp_epsilon(history, 1e-5) <= theirs(RDP_ORDERS) * (1 + 1e-9)


def test_without_sampling_it_is_the_gaussian_mechanisms():
    assert renyi.divergence(2.0, 1.0, (1.5, 8.0)).tolist() == [1.5 / 8, 1.0]


def test_what_cannot_be_told_is_infinite_and_never_negative():
    extreme = [renyi.divergence(sigma, q, RDP_ORDERS) for sigma in (1e-3, 1e3) for q in (1e-12, 0.5, 1 - 1e-12)]
    assert not np.isnan(extreme).any() and np.min(extreme) >= 0
    assert renyi.epsilon((2.0, 3.0), np.array([math.inf, math.inf]), 1e-5) == math.inf


def test_the_private_method_of_opacus_that_is_replaced_is_still_the_one_that_chooses_the_grid(monkeypatch):
    """`QuickPRVAccountant` overrides `_get_domain`. If Opacus renames it, the override would silently do nothing."""
    assert list(signature(PRVAccountant._get_domain).parameters) == [
        "self", "prvs", "num_self_compositions", "eps_error", "delta_error"]
    asked = []
    ours = QuickPRVAccountant._get_domain
    monkeypatch.setattr(QuickPRVAccountant, "_get_domain",
                        lambda *args, **named: asked.append(1) or ours(*args, **named))
    assert prv_epsilon((Spend(1.0, 0.0101, 500),), 1e-5) is not None and asked == [1]


@pytest.mark.parametrize("history", [
    ((1.0, 0.01, 500),), ((0.543, 0.023, 80),), ((1.0, 0.01, 500), (2.0, 0.1, 1), (0.8, 0.02, 100))])
def test_the_grid_of_prv_is_opacus_own(history):
    opacus = PRVAccountant()
    opacus.history = list(history)
    ours = prv_epsilon(tuple(Spend(sigma, q, steps) for sigma, q, steps in history), 1e-5)
    assert ours == pytest.approx(opacus.get_epsilon(1e-5), abs=1e-6)
