"""Lower bounds on ε from guesses about canaries: privacy auditing with one training run.

Source: Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv:2305.08846. A fair coin decided for each of m canaries whether it
was in the training data. A guesser who sees everything that was released guesses this for some of the canaries and
abstains for the others. If the training were (ε, δ)-differentially private for one canary, then for any guesser at
least v of r guesses would be right with probability at most (the paper's Theorem 5.2)

    P[W >= v]  +  2 m δ · max_i  P[v > W >= v - i] / i,      W ~ Binomial(r, e^ε / (1 + e^ε))

Every ε for which this is below 5 % is refuted with 95 % confidence. For δ = 0 the bound is tight: randomised response
on each canary attains it.

    Paper   Here         Meaning
    m       canaries     number of canaries
    r, v    Guesses      number of guesses, and number of right guesses
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import binom, rankdata

SHARES = (0.02, 0.1, 0.3)
"""Shares of the canaries that are guessed "in": those with the highest scores.

Equally many, those with the lowest scores, are guessed "out", or none are. All six ways are tried, each at a sixth of
the significance level, so that the best one may be reported."""


@dataclass(frozen=True)
class Guesses:
    """Guesses about canaries, and the bound that follows from them.

    Attributes:
        guessed_in: number of canaries guessed to be in the data.
        guessed_out: number of canaries guessed not to be in it.
        right: number of guesses that are right.
        epsilon: lower bound on ε from these guesses. Its confidence allows for all ways of guessing that were tried.
    """

    guessed_in: int
    guessed_out: int
    right: int
    epsilon: float


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound the probability of at least `right` right guesses if the training is (epsilon, delta)-private.

    Args:
        canaries: number of canaries, m.
        guesses: number of guesses, r.
        right: number of right guesses, v.
        epsilon: ε.
        delta: δ.

    Raises:
        ValueError: the numbers contradict each other.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} of {guesses} guesses about {canaries} canaries cannot be right; give numbers with "
                         "0 <= right <= guesses <= canaries")
    accuracy = expit(epsilon)
    tail = float(binom.sf(right - 1, guesses, accuracy))
    if delta and right:
        i = np.arange(1, right + 1)
        below = np.cumsum(binom.pmf(right - i, guesses, accuracy))
        tail += 2 * canaries * delta * float(np.max(below / i))
    return min(1.0, tail)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, significance: float = 0.05) -> float:
    """Return the largest ε such that every smaller one is refuted at this significance; 0.0 if none is refuted."""
    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) < significance

    if not guesses or not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit(scores: np.ndarray, included: np.ndarray, delta: float, significance: float = 0.05) -> Guesses:
    """Guess from scores in several ways and return the best guesses.

    Args:
        scores: [m], higher for canaries that seem to be in the data. They may depend on `included` only through what
            was released.
        included: [m] bool, the coins.
        delta: δ of the guarantee that is audited.
        significance: probability with which the bound may be wrong, with the choice of the best way taken into account.
    """
    count = len(scores)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    sizes = [(k, k * both) for k in dict.fromkeys(max(1, round(share * count)) for share in SHARES) for both in (0, 1)]
    ways = []
    for top, bottom in sizes:
        right = int(included[order[:top]].sum()) + int((~included[order[count - bottom:]]).sum())
        ways.append(Guesses(top, bottom, right, lower_bound(count, top + bottom, right, delta,
                                                            significance / len(sizes))))
    return max(ways, key=lambda way: way.epsilon)


@dataclass(frozen=True)
class Membership:
    """Figures of how well scores tell members from non-members.

    Attributes:
        auc: area under the ROC curve.
        tpr_at_1_percent: true positive rate at a false positive rate of 1 %.
    """

    auc: float
    tpr_at_1_percent: float


def membership(scores: np.ndarray, included: np.ndarray) -> Membership:
    """Return the usual figures of a membership-inference attack. They say nothing about ε."""
    inside, outside = int(included.sum()), int((~included).sum())
    ranks = rankdata(scores)
    auc = (ranks[included].sum() - inside * (inside + 1) / 2) / (inside * outside)
    allowed = int(0.01 * outside)
    threshold = np.sort(scores[~included])[outside - 1 - allowed]
    return Membership(float(auc), float(np.mean(scores[included] > threshold)))
