"""Privacy accounting: the (epsilon, delta) that noised steps cost, and the noise that a budget calls for.

A step samples its units by Poisson sampling, clips each unit's contribution and adds Gaussian noise to the sum.

Unit: one training record of one client, which is a row (for language models a whole sequence); or, in a run that
protects a column's units, all rows of one client that share a value of that column (one patient, say).
Relation: zero-out. Two data sets are neighbours if one unit of the first is replaced in the second by a null unit that
contributes nothing. It accounts like add/remove. No guarantee is claimed for the replace-one relation.

Two accountants give upper bounds on epsilon: PRV (Gopi et al., NeurIPS 2021, arXiv:2106.02848, as implemented in
Opacus) and RDP (Mironov et al., arXiv:1908.10530). Epsilon is PRV's bound. It is RDP's where PRV fails, is not finite
or is larger. The CLT (GDP) approximation is not offered: under sampling it underestimates epsilon.

    Paper   Here               Meaning
    sigma   noise_multiplier   standard deviation of the noise / clip_norm
    q       sampling_rate      probability with which each unit enters a step
    n-hat   declared_size      public nominal number of units; the exact number stays with the client
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from typing import TYPE_CHECKING

import numpy as np

from fedlora.privacy.spend import Spend, rdp_epsilon

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

PRV_LIMIT = 64.0
"""RDP epsilon above which PRV is not asked: it would be slow and is often infinite there."""

MOST_SAMPLING_RATE = 0.2
"""Default limit on the sampling rate. Above it, sampling hardly adds to a record's privacy."""

PRV_LEAST_DELTA = 1e-11
"""Smallest delta at which PRV is asked. Below it, rounding in PRV's Fourier transforms breaks the upper bound (at
1e-13 it came out 0.2 % too low)."""

SIGMA_STEP = 1e-3
"""Granularity of calibration: noise multipliers are multiples of this."""

# PRV is imported inside the functions that call it: it imports torch, which reading a ledger does not need.


class Accountant:
    """A history of noised steps, and the epsilon that they cost together."""

    def __init__(self, history: tuple[Spend, ...] = ()) -> None:
        self._history = list(history)

    @property
    def history(self) -> tuple[Spend, ...]:
        """The steps added so far, in order; consecutive steps with equal parameters are one entry."""
        return tuple(self._history)

    def add(self, noise_multiplier: float, sampling_rate: float, steps: int) -> None:
        """Append steps to the history.

        Args:
            noise_multiplier: standard deviation of the noise / clip norm; positive and finite.
            sampling_rate: probability with which each unit enters a step, in (0, 1].
            steps: number of steps with these parameters, at least 1.

        Raises:
            ValueError: a parameter is out of range.
        """
        spend = Spend(float(noise_multiplier), float(sampling_rate), steps)
        last = self._history[-1] if self._history else None
        if last and (last.noise_multiplier, last.sampling_rate) == (spend.noise_multiplier, spend.sampling_rate):
            self._history[-1] = Spend(spend.noise_multiplier, spend.sampling_rate, last.steps + steps)
        else:
            self._history.append(spend)

    def epsilon(self, delta: float) -> float:
        """Return an upper bound on the epsilon at `delta` of the whole history; 0.0 if the history is empty."""
        return _epsilon(self.history, delta)


@functools.lru_cache(maxsize=4096)
def _epsilon(history: tuple[Spend, ...], delta: float) -> float:
    bound = rdp_epsilon(history, delta)
    prv = prv_epsilon(history, delta)
    return prv if prv is not None and prv <= bound else bound


@functools.lru_cache(maxsize=4096)
def prv_epsilon(history: tuple[Spend, ...], delta: float) -> float | None:
    """Return PRV's upper bound on epsilon at `delta` (Gopi et al., arXiv:2106.02848, as implemented in Opacus).

    Returns:
        0.0 for an empty history. None if RDP's epsilon exceeds `PRV_LIMIT`, if delta is below `PRV_LEAST_DELTA`, or if
        PRV fails or gives no finite value.
    """
    bound = rdp_epsilon(history, delta)
    if not history:
        return 0.0
    if bound > PRV_LIMIT or delta < PRV_LEAST_DELTA:
        return None
    from fedlora.privacy.prv import QuickPRVAccountant

    accountant = QuickPRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sampling_rate, s.steps) for s in history]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            prv = float(accountant.get_epsilon(delta))
        except (ValueError, RuntimeError, IndexError, MemoryError):  # PRV's grid is too coarse, say for a tiny delta
            return None
    return prv if math.isfinite(prv) and prv >= 0 else None


@functools.lru_cache(maxsize=1024)
def pld_epsilon(history: tuple[Spend, ...], delta: float) -> float | None:
    """Return epsilon at `delta` by dp-accounting's privacy loss distributions (PLD).

    This is a cross-check that shares no code with PRV and RDP. It is an upper bound too: dp-accounting's pessimistic
    estimate, by connecting the dots (Doroshenko et al., arXiv:2207.04380). The grid chosen below adds at most 0.002 for
    q in [.001, .2], sigma in [.6, 4] and 5000 steps.

    Returns:
        0.0 for an empty history. None if RDP's epsilon exceeds `PRV_LIMIT` or the result is not finite.
    """
    if rdp_epsilon(history, delta) > PRV_LIMIT:
        return None
    if not history:
        return 0.0
    epsilon = float(privacy_loss(history).get_epsilon_for_delta(delta))
    return epsilon if math.isfinite(epsilon) else None


@functools.lru_cache(maxsize=4)  # some megabytes each
def privacy_loss(history: tuple[Spend, ...]) -> PrivacyLossDistribution:
    """Return the distribution of the privacy loss of a history, from above (see `pld_epsilon`).

    Args:
        history: at least one entry, with a Rényi epsilon of at most `PRV_LIMIT`: the grid grows with it.
    """
    # The grid must be fine compared with the standard deviation of one step's privacy loss, which is about
    # q sqrt(exp(1/sigma^2) - 1), the root of the chi-squared divergence.
    variance = sum(s.steps * s.sampling_rate**2 * math.expm1(min(50.0, s.noise_multiplier**-2)) for s in history)
    interval = min(5e-4, max(2e-6, 0.1 * math.sqrt(variance / sum(s.steps for s in history))))
    losses = [_loss_of_a_step(s.noise_multiplier, s.sampling_rate, interval).self_compose(s.steps) for s in history]
    return functools.reduce(lambda a, b: a.compose(b), losses)


@functools.lru_cache(maxsize=8)  # a client asks for the same distribution after each round
def _loss_of_a_step(noise_multiplier: float, sampling_rate: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise_multiplier, sampling_prob=sampling_rate,
                                   value_discretization_interval=interval)


@functools.lru_cache(maxsize=1024)
def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier, a multiple of `SIGMA_STEP`, that keeps a run within (epsilon, delta).

    The guarantee is for one unit under the zero-out relation (see the module).

    Args:
        epsilon: positive and finite.
        delta: in (0, 1).
        sampling_rate: probability with which each unit enters a step, in (0, 1].
        steps: the most steps that the run can take (local steps × maximum participations), never an expected number.

    Raises:
        ValueError: epsilon is not positive and finite, or no noise multiplier up to 1e6 is enough.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon!r}; noise can be calibrated to a positive, finite epsilon only")

    def fits(sigma: float) -> bool:  # RDP alone: milliseconds, and never below the final bound
        return rdp_epsilon((Spend(sigma, sampling_rate, steps),), delta) <= epsilon

    high = 1.0
    while not fits(high):
        high *= 2
        if high > 1e6:
            raise ValueError(f"no noise keeps {steps} steps at sampling rate {sampling_rate} within epsilon {epsilon} "
                             f"at delta {delta}; allow more epsilon, a larger delta or fewer steps")
    while fits(high / 2):
        high /= 2
    low = high / 2
    while low < 0.9 * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return SIGMA_STEP * _least_multiple(epsilon, math.floor(low / SIGMA_STEP), math.ceil(high / SIGMA_STEP),
                                        lambda multiple: _epsilon(
                                            (Spend(multiple * SIGMA_STEP, sampling_rate, steps),), delta))


def _least_multiple(epsilon: float, low: int, high: int, spent: Callable[[int], float]) -> int:
    """Return the smallest multiple of `SIGMA_STEP` that spends at most `epsilon`.

    Within a few percent of a sigma, epsilon is almost a power of sigma. Interpolating on logarithms therefore needs
    only three or four evaluations.

    Args:
        epsilon: the limit.
        low: a guess below the answer; it is lowered if it already spends at most `epsilon`.
        high: a multiple that spends at most `epsilon`.
        spent: multiple → the epsilon that it spends, not increasing.
    """
    while low and spent(low) <= epsilon:
        low, high = math.floor(0.9 * low), low
    interpolations = 6
    while high - low > 1:
        guess = (low + high) // 2
        if low and interpolations and math.isfinite(spent(low)) and spent(high) > 0:
            interpolations -= 1
            share = math.log(spent(low) / epsilon) / math.log(spent(low) / spent(high))
            guess = min(max(math.ceil(low * (high / low) ** share), low + 1), high - 1)
        low, high = (low, guess) if spent(guess) <= epsilon else (guess, high)
    return high


def four_digits(epsilon: float, *, down: bool = False) -> str:
    """Format epsilon with four significant digits, rounded up so that a text never promises more than was computed.

    Args:
        epsilon: at least 0, or infinite.
        down: round down instead, for an epsilon that is left or may still be asked for.
    """
    if math.isinf(epsilon):
        return "infinite"
    places = 3 if epsilon <= 0 else max(0, 3 - math.floor(math.log10(epsilon)))
    scaled = round(epsilon * 10**places, 6)
    return f"{(math.floor if down else math.ceil)(scaled) / 10**places:.{places}f}"


def short(value: float, *, up: bool = False) -> str:
    """Format a figure with at most four significant digits, as in 0.01829 or 1e-05.

    Args:
        value: the figure.
        up: round up, for a delta, so that a text never promises more than was computed.
    """
    if up and math.isfinite(value):
        value = float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(value)))
    return f"{value:.4g}"


def nominal_size(records: int) -> int:
    """Return the default declared size: `records` rounded down to two significant digits (14,812 becomes 14,000)."""
    if records < 1:
        raise ValueError(f"there are {records} training records; at least one is needed")
    unit: int = 10 ** max(0, len(str(records)) - 2)
    return records // unit * unit


@dataclass(frozen=True)
class Budget:
    """One client's privacy limit for one run, and the public size from which its noise is computed.

    Attributes:
        epsilon: limit of the run's guarantee, for one unit under the zero-out relation; positive and finite.
        delta: the delta of that guarantee; positive and below 1 / declared_size.
        declared_size: nominal number of units. It is public, and the same for neighbouring data sets.
        max_sampling_rate: a plan that would sample each unit with a higher probability is refused.
    """

    epsilon: float
    delta: float
    declared_size: int
    max_sampling_rate: float = MOST_SAMPLING_RATE

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon is {self.epsilon!r}; it must be positive and finite")
        if self.declared_size < 1:
            raise ValueError(f"declared_size is {self.declared_size!r}; it must be at least 1")
        if not 0 < self.max_sampling_rate <= 1:
            raise ValueError(f"max_sampling_rate is {self.max_sampling_rate!r}; it must be in (0, 1]")
        if not 0 < self.delta < 1 / self.declared_size:
            raise ValueError(f"delta is {self.delta!r}; it must be positive and below 1/{self.declared_size} (one over "
                             "the declared size): a larger one would allow publishing one record in full")

    @classmethod
    def declare(cls, records: int, *, epsilon: float, delta: float | None = None, declared_size: int | None = None,
                max_sampling_rate: float = MOST_SAMPLING_RATE) -> Budget:
        """Return a budget with the defaults filled in.

        Args:
            records: exact number of units; used only for the default of `declared_size`, and not kept.
            epsilon: limit of the run's guarantee.
            delta: default min(1e-5, 0.1 / declared size).
            declared_size: public number of units; default `nominal_size(records)`.
            max_sampling_rate: limit on the probability with which each unit enters a step.

        Raises:
            ValueError: a value is out of range.
        """
        size = nominal_size(records) if declared_size is None else declared_size
        if size < 1:
            raise ValueError(f"declared_size is {size!r}; it must be at least 1")
        return cls(epsilon, min(1e-5, 0.1 / size) if delta is None else delta, size, max_sampling_rate)

    def sampling_rate(self, expected_batch: int) -> float:
        """Return the sampling rate q = min(1, expected_batch / declared_size).

        Raises:
            ValueError: q is above `max_sampling_rate`; the message names an expected batch that would fit.
        """
        q = min(1.0, expected_batch / self.declared_size)
        if q > self.max_sampling_rate:
            largest = math.floor(self.max_sampling_rate * self.declared_size)
            remedy = (f"an expected batch of at most {largest} would fit" if largest else
                      f"it takes {math.ceil(expected_batch / self.max_sampling_rate)} declared records")
            raise ValueError(f"an expected batch of {expected_batch} out of {self.declared_size} declared records "
                             f"samples each record with probability {q:.3f}, and at most {self.max_sampling_rate} is "
                             f"allowed; {remedy}")
        return q

    def noise_multiplier(self, expected_batch: int, steps: int) -> float:
        """Return the smallest noise multiplier with which a run stays within this budget.

        Args:
            expected_batch: units that a step samples on average.
            steps: the most steps that the run can take.

        Raises:
            ValueError: the sampling rate is above the limit, or no noise is enough.
        """
        return calibrate(self.epsilon, self.delta, self.sampling_rate(expected_batch), steps)
