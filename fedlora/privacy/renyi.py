r"""Rényi divergence of the Poisson-sampled Gaussian mechanism, at many orders at once.

Source: Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3. The source's relation is adding or removing one
unit; zero-out costs the same (see `fedlora.privacy.accounting`). One step with sampling rate q and noise multiplier
sigma is (alpha, log(A_alpha) / (alpha - 1))-RDP. For a whole alpha,

    A = sum_{k=0..alpha} C(alpha, k) (1 - q)^(alpha - k) q^k exp((k² - k) / 2 sigma²)

For any other alpha, A is the sum of two such series over k = 0, 1, …: one for the integral below
z0 = sigma² log(1/q - 1) + 1/2 and one for the integral above it. (At z0, both parts of the mixture have the same
density.) With j = alpha - k and Phi the standard normal distribution function,

    A = sum_k C(alpha, k) [ (1 - q)^j q^k exp((k² - k) / 2 sigma²) Phi((z0 - k) / sigma)
                          + (1 - q)^k q^j exp((j² - j) / 2 sigma²) Phi((j - z0) / sigma) ]

where C(alpha, k) may be negative.

Opacus computes the same order by order and term by term in Python. This took most of the time of a search for a noise
multiplier. Tests compare this module with Opacus, with dp-accounting at whole orders, and with the integral.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import gammaln, gammasgn, log_ndtr

SMALLEST_TERM = -30.0
"""A series ends at the first term whose logarithm is below this. The sum is at least 1, and the terms alternate in sign
by then, so what is cut off is negligible."""

BLOCK = 64
"""Number of terms in the first block. Each further one has twice as many, for the series that have not ended."""

MOST_TERMS = 2**17
"""Number of terms after which a series counts as divergent."""


def divergence(noise_multiplier: float, sampling_rate: float, orders: tuple[float, ...]) -> np.ndarray:
    """Return the Rényi divergence of one step at each order.

    Args:
        noise_multiplier: sigma > 0, in units of the clip norm.
        sampling_rate: q in (0, 1].
        orders: the alphas, each > 1.

    Returns:
        `[len(orders)]`, read-only. Infinite at an order where rounding (cancellation or overflow) leaves no usable
        value, so that a rounding error never lowers the cost.
    """
    return _divergence(float(noise_multiplier), float(sampling_rate), tuple(map(float, orders)))


@functools.lru_cache(maxsize=4096)
def _divergence(sigma: float, q: float, orders: tuple[float, ...]) -> np.ndarray:
    alphas = np.array(orders)
    values = np.full(len(alphas), math.inf)
    with np.errstate(all="ignore"):
        if q == 1:
            values = alphas / (2 * sigma**2)
        else:
            whole = alphas % 1 == 0
            for places, log_moment in ((whole, _log_moments_at_whole_orders), (~whole, _log_moments_at_other_orders)):
                if places.any():
                    values[places] = log_moment(alphas[places], q, sigma) / (alphas[places] - 1)
    values[~(values >= 0)] = math.inf
    values.flags.writeable = False
    return values


def conversion(orders: Sequence[float], delta: float) -> np.ndarray:
    """Return the term that turns a Rényi divergence into an epsilon at `delta`, for each order.

    Source: Balle, Barthe, Gaboardi, Hsu, Sato 2020, arXiv:1905.09982, theorem 21.

    Returns:
        `[len(orders)]`: epsilon at an order is its divergence plus this.
    """
    alphas = np.asarray(orders, dtype=np.float64)
    return np.log1p(-1 / alphas) - (math.log(delta) + np.log(alphas)) / (alphas - 1)


def epsilon(orders: Sequence[float], divergences: np.ndarray, delta: float) -> float:
    """Return the smallest epsilon that any order gives at `delta`, at least 0; infinite if no order gives a finite one.

    Args:
        orders: the alphas, each > 1.
        divergences: `[len(orders)]`, the Rényi divergence at each order.
        delta: in (0, 1).
    """
    return max(0.0, float(np.min(divergences + conversion(orders, delta))))


def _log_moments_at_whole_orders(alphas: np.ndarray, q: float, sigma: float) -> np.ndarray:
    """Return log A_alpha at whole orders, `[orders]`."""
    k = np.arange(int(alphas.max()) + 1)
    log_terms = (_log_binomials(tuple(alphas)) + (alphas[:, None] - k) * math.log1p(-q) + k * math.log(q)
                 + (k * k - k) / (2 * sigma**2))
    return _log_of_sum(log_terms, 1.0)


@functools.lru_cache(maxsize=16)
def _log_binomials(alphas: tuple[float, ...]) -> np.ndarray:
    """Return log C(alpha, k) at whole orders, `[orders, largest order + 1]`; -inf for k above the order."""
    alpha, k = np.array(alphas)[:, None], np.arange(int(max(alphas)) + 1)
    return np.where(k <= alpha, gammaln(alpha + 1) - gammaln(k + 1) - gammaln(np.maximum(alpha - k, 0) + 1), -np.inf)


def _log_moments_at_other_orders(alphas: np.ndarray, q: float, sigma: float) -> np.ndarray:
    """Return log A_alpha at orders that are not whole, `[orders]`; nan if the series needs over `MOST_TERMS` terms."""
    z0 = sigma**2 * (math.log1p(-q) - math.log(q)) + 0.5
    gauss: Callable[[np.ndarray], np.ndarray] = lambda x: (x * x - x) / (2 * sigma**2)  # noqa: E731
    result = np.full(len(alphas), np.nan)
    open_, log_terms, signs = np.arange(len(alphas)), np.empty((len(alphas), 0)), np.empty((len(alphas), 0))
    first, count = 0, BLOCK
    while len(open_) and first < MOST_TERMS:
        alpha, k = alphas[open_, None], np.arange(first, first + count, dtype=np.float64)
        j = alpha - k
        log_binomial = gammaln(alpha + 1) - gammaln(k + 1) - gammaln(j + 1)
        below = j * math.log1p(-q) + k * math.log(q) + gauss(k) + log_ndtr((z0 - k) / sigma)
        above = k * math.log1p(-q) + j * math.log(q) + gauss(j) + log_ndtr((j - z0) / sigma)
        log_terms = np.hstack([log_terms, log_binomial + np.logaddexp(below, above)])
        signs = np.hstack([signs, gammasgn(j + 1)])
        done = log_terms[:, -1] < SMALLEST_TERM
        result[open_[done]] = _log_of_sum(log_terms[done], signs[done])
        open_, log_terms, signs = open_[~done], log_terms[~done], signs[~done]
        first, count = first + count, 2 * count
    return result


def _log_of_sum(log_terms: np.ndarray, signs: np.ndarray | float) -> np.ndarray:
    """Return the logarithm of the sum of signs · exp(log_terms) over each row, `[rows]`; nan if the sum is negative."""
    largest = log_terms.max(axis=1, initial=-np.inf)
    logarithms: np.ndarray = largest + np.log((signs * np.exp(log_terms - largest[:, None])).sum(axis=1))
    return logarithms
