"""What guesses about canaries say about ε: privacy auditing with one training run.

Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv:2305.08846. Of m canaries, each was in the training data or not by a fair
coin of its own. Whoever sees all that was released guesses of some canaries whether they were in, and abstains on the
others. Were the training (ε, δ)-differentially private for one canary, then, whatever the guesser does, of r guesses
at least v would be right with probability at most (the paper's Theorem 5.2)

    P[W >= v]  +  2 m δ · max_i  P[v > W >= v - i] / i,      W ~ Binomial(r, e^ε / (1 + e^ε))

Every ε for which that is below 5 % is refuted with confidence 95 %. For δ = 0 the bound is attained by randomised
response on each canary.

Paper   Here         Meaning
m       canaries     how many there are
r, v    Guesses      how many were guessed, and how many of these rightly
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import binom, rankdata

SHARES = (0.02, 0.1, 0.3)
"""Of all canaries, how many of the highest scores are guessed "in"; as many of the lowest "out", or none at all. All
six ways are tried, each at a sixth of the significance level, so that the best may be reported."""


@dataclass(frozen=True)
class Guesses:
    """One way to guess, and what it shows.

    Attributes:
        guessed_in, guessed_out: how many canaries were guessed to be in, and out.
        right: how many of these guesses are right.
        epsilon: lower bound on ε that these guesses give, at the confidence asked for, however many ways were tried.
    """

    guessed_in: int
    guessed_out: int
    right: int
    epsilon: float


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The probability of at least `right` right guesses is at most this if training is (epsilon, delta)-private."""
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} of {guesses} guesses about {canaries} canaries cannot be right")
    accuracy = expit(epsilon)
    tail = float(binom.sf(right - 1, guesses, accuracy))
    if delta and right:
        i = np.arange(1, right + 1)
        below = np.cumsum(binom.pmf(right - i, guesses, accuracy))
        tail += 2 * canaries * delta * float(np.max(below / i))
    return min(1.0, tail)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, significance: float = 0.05) -> float:
    """The largest ε below which every one is refuted at this significance; 0.0 if none is."""
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
    """The best of the ways to guess from scores; its bound holds at `significance`, the choice among them included.

    Args:
        scores: [m], higher where a canary seems to be in. They must not depend on `included` but through what was
            released.
        included: [m] bool, the coins.
        delta: of the guarantee that is audited.
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
    """How well scores tell members from others: area under the ROC curve, and the true positive rate at 1 % false."""

    auc: float
    tpr_at_1_percent: float


def membership(scores: np.ndarray, included: np.ndarray) -> Membership:
    """The usual figures of a membership-inference attack; no statement about ε."""
    inside, outside = int(included.sum()), int((~included).sum())
    ranks = rankdata(scores)
    auc = (ranks[included].sum() - inside * (inside + 1) / 2) / (inside * outside)
    allowed = int(0.01 * outside)
    threshold = np.sort(scores[~included])[outside - 1 - allowed]
    return Membership(float(auc), float(np.mean(scores[included] > threshold)))
