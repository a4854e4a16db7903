"""What a run costs: (epsilon, delta) of Poisson-sampled, clipped and noised steps.

Unit: one training record (a row; a whole sequence for language models) of one client. Relation: zero-out, one record
is replaced by a null record that contributes nothing; it accounts like add/remove. Replace-one is not claimed.

Epsilon is PRV's upper bound (Gopi et al., NeurIPS 2021, arXiv:2106.02848, in Opacus), or RDP's (Mironov et al.,
arXiv:1908.10530) where PRV fails, is not finite or is the larger one. The CLT (GDP) approximation underestimates under
sampling and is not offered.

Paper   Here               Meaning
sigma   noise_multiplier   standard deviation of the noise / clip_norm
q       sampling_rate      probability with which each record enters a step
n-hat   declared_size      public nominal number of records; the exact one stays with the client
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlora.privacy.spend import Spend, rdp_epsilon

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

PRV_LIMIT = 64.0
"""Where RDP already says more than this, PRV is slow, tends to be infinite, and is not asked."""

MOST_SAMPLING_RATE = 0.2
"""Where the owner says nothing else: above it, sampling hardly hides a record."""

PRV_LEAST_DELTA = 1e-11
"""Below it the rounding of PRV's transforms shows, and it is no upper bound (at 1e-13 it was 0.2 % too low)."""

SIGMA_STEP = 1e-3
"""Noise multipliers are calibrated to multiples of this."""

# PRV is imported where it is called: it imports torch, which reading a ledger does not need.


class Accountant:
    """Adds up what was spent."""

    def __init__(self, history: tuple[Spend, ...] = ()) -> None:
        self._history = list(history)

    @property
    def history(self) -> tuple[Spend, ...]:
        return tuple(self._history)

    def add(self, noise_multiplier: float, sampling_rate: float, steps: int) -> None:
        """Add steps."""
        spend = Spend(float(noise_multiplier), float(sampling_rate), steps)
        last = self._history[-1] if self._history else None
        if last and (last.noise_multiplier, last.sampling_rate) == (spend.noise_multiplier, spend.sampling_rate):
            self._history[-1] = Spend(spend.noise_multiplier, spend.sampling_rate, last.steps + steps)
        else:
            self._history.append(spend)

    def epsilon(self, delta: float) -> float:
        """Upper bound on epsilon at `delta` of everything charged so far; 0.0 for an empty history."""
        return _epsilon(self.history, delta)


@functools.lru_cache(maxsize=4096)
def _epsilon(history: tuple[Spend, ...], delta: float) -> float:
    bound = rdp_epsilon(history, delta)
    prv = prv_epsilon(history, delta)
    return prv if prv is not None and prv <= bound else bound


@functools.lru_cache(maxsize=4096)
def prv_epsilon(history: tuple[Spend, ...], delta: float) -> float | None:
    """PRV's upper bound; 0.0 for an empty history, None where RDP exceeds `PRV_LIMIT`, delta is below
    `PRV_LEAST_DELTA`, or PRV fails or is not finite.
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
        except (ValueError, RuntimeError, IndexError, MemoryError):  # its grid is too coarse, for a tiny delta say
            return None
    return prv if math.isfinite(prv) and prv >= 0 else None


@functools.lru_cache(maxsize=1024)
def pld_epsilon(history: tuple[Spend, ...], delta: float) -> float | None:
    """Epsilon by dp-accounting's privacy loss distributions: a check that shares no code with PRV and RDP.

    It is an upper bound too (pessimistic, connect-the-dots); the grid below adds at most 0.002 for q in [.001, .2],
    sigma in [.6, 4], 5000 steps.

    Returns:
        0.0 for an empty history; None where RDP exceeds `PRV_LIMIT`, or where the result is not finite.
    """
    if rdp_epsilon(history, delta) > PRV_LIMIT:
        return None
    if not history:
        return 0.0
    # The grid has to be fine beside the standard deviation of a step's privacy loss, about q sqrt(exp(1/sigma^2) - 1).
    variance = sum(s.steps * s.sampling_rate**2 * math.expm1(min(50.0, s.noise_multiplier**-2)) for s in history)
    interval = min(5e-4, max(2e-6, 0.1 * math.sqrt(variance / sum(s.steps for s in history))))
    losses = [_loss_of_a_step(s.noise_multiplier, s.sampling_rate, interval).self_compose(s.steps) for s in history]
    epsilon = float(functools.reduce(lambda a, b: a.compose(b), losses).get_epsilon_for_delta(delta))
    return epsilon if math.isfinite(epsilon) else None


@functools.lru_cache(maxsize=8)  # a client asks for one and the same after each round
def _loss_of_a_step(noise_multiplier: float, sampling_rate: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise_multiplier, sampling_prob=sampling_rate,
                                   value_discretization_interval=interval)


@functools.lru_cache(maxsize=1024)
def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier, to `SIGMA_STEP`, with which `steps` steps stay within (epsilon, delta).

    `steps` is the number that will be done at most: local steps × maximum participations, never an expectation.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon!r}; noise can be calibrated to a positive, finite epsilon only")

    def fits(sigma: float) -> bool:  # by RDP alone, which takes milliseconds
        return rdp_epsilon((Spend(sigma, sampling_rate, steps),), delta) <= epsilon

    high = 1.0
    while not fits(high):
        high *= 2
        if high > 1e6:
            raise ValueError(f"epsilon {epsilon} at delta {delta} cannot be reached in {steps} steps at sampling rate "
                             f"{sampling_rate}; allow more epsilon, a larger delta or fewer steps")
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
    """The smallest multiple of `SIGMA_STEP` that spends at most `epsilon`, where `high` does; `low` is a guess.

    Epsilon is almost a power of sigma over a few percent of it, so that three or four evaluations find it.
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
    """Epsilon as a person reads it, rounded up: a text never promises more than what was computed. `down` for what is
    left, or may be asked for.
    """
    if math.isinf(epsilon):
        return "infinite"
    places = 3 if epsilon <= 0 else max(0, 3 - math.floor(math.log10(epsilon)))
    scaled = round(epsilon * 10**places, 6)
    return f"{(math.floor if down else math.ceil)(scaled) / 10**places:.{places}f}"


def nominal_size(records: int) -> int:
    """The default declared size: `records` rounded down to two significant digits (14,812 becomes 14,000)."""
    if records < 1:
        raise ValueError(f"there are {records} training records; at least one is needed")
    unit = 10 ** max(0, len(str(records)) - 2)
    return records // unit * unit


@dataclass(frozen=True)
class Budget:
    """One client's limit for one run, and the public size from which everything else is computed.

    Attributes:
        epsilon, delta: of the guarantee, for one record under zero-out.
        declared_size: nominal number of records. It is public, and equal for neighbouring data sets.
        max_sampling_rate: a plan that would sample more often is refused.
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
            raise ValueError(f"delta is {self.delta!r}; it must be positive and below 1/{self.declared_size}, or "
                             "publishing one record in full would satisfy it")

    @classmethod
    def declare(cls, records: int, *, epsilon: float, delta: float | None = None, declared_size: int | None = None,
                max_sampling_rate: float = MOST_SAMPLING_RATE) -> Budget:
        """Fill in the defaults: declared size `nominal_size(records)`, delta = min(1e-5, 0.1 / declared size)."""
        size = nominal_size(records) if declared_size is None else declared_size
        if size < 1:
            raise ValueError(f"declared_size is {size!r}; it must be at least 1")
        return cls(epsilon, min(1e-5, 0.1 / size) if delta is None else delta, size, max_sampling_rate)

    def sampling_rate(self, expected_batch: int) -> float:
        """q = min(1, b / n-hat).

        Raises:
            ValueError: q is above `max_sampling_rate`; it names the expected batch that would fit.
        """
        q = min(1.0, expected_batch / self.declared_size)
        if q > self.max_sampling_rate:
            largest = math.floor(self.max_sampling_rate * self.declared_size)
            remedy = (f"an expected batch of at most {largest} would fit" if largest else
                      f"it takes {math.ceil(expected_batch / self.max_sampling_rate)} of them")
            raise ValueError(f"an expected batch of {expected_batch} out of {self.declared_size} declared records "
                             f"samples each with probability {q:.3f}, above {self.max_sampling_rate}; {remedy}")
        return q

    def noise_multiplier(self, expected_batch: int, steps: int) -> float:
        """The noise with which `steps` steps, the most there can be, exhaust and do not exceed this budget."""
        return calibrate(self.epsilon, self.delta, self.sampling_rate(expected_batch), steps)
