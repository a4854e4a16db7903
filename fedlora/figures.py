"""Figures of an evaluation: computed by scikit-learn and SciPy from what was measured for each record.

A name with a slash says more about the figure before the slash: `accuracy/low` and `accuracy/high` are the ends of its
95 % interval, `recall/urgent` is the recall of one label. Tables for people leave these out (`headline`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.privacy.accounting import short

MOST_RECALLS = 20
"""Most labels whose recalls are given one by one."""
MAJORITY = "accuracy/majority"
"""Name of the majority rate: the accuracy of always predicting the most frequent label of the held-out records."""
CONFIDENCE = 0.95
RESAMPLES = 999
MOST_AT_ONCE = 2_000_000
"""Most values that a bootstrap draws at once."""


def headline(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures for tables and curves: neither those with a slash in their names nor the count."""
    return {name: value for name, value in figures.items() if "/" not in name and name != "count"}


def title(name: str) -> str:
    """Return a figure's name as people write it: "macro F1" for macro_f1."""
    return {"macro_f1": "macro F1", "auroc": "AUROC"}.get(name, name.replace("_", " "))


def for_people(figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return (name, value, 95 % interval) of each figure for a table: the main ones, recalls, and the majority rate.

    The interval is "" where there is none.
    """
    recalls = [name for name in figures if name.startswith("recall/") and not name.endswith(("/low", "/high"))]
    rows = []
    for name in (*headline(figures), *recalls, *({MAJORITY} & figures.keys())):
        ends = [figures[end] for end in (f"{name}/low", f"{name}/high") if end in figures]
        told = ("majority rate (always the most frequent label)" if name == MAJORITY else
                f"recall of {name.removeprefix('recall/')}" if name in recalls else title(name))
        rows.append((told, short(figures[name]), " to ".join(map(short, ends))))
    return rows


def proportion(name: str, hits: np.ndarray) -> dict[str, float]:
    """Return a proportion with its interval (Wilson's, at 95 %).

    Args:
        name: the figure's name.
        hits: [n] whether each of n > 0 records counts.

    Returns:
        The values of `name`, `name/low` and `name/high`.
    """
    from scipy.stats import binomtest

    tested = binomtest(int(hits.sum()), len(hits))
    interval = tested.proportion_ci(CONFIDENCE, method="wilson")
    return {name: float(tested.statistic), f"{name}/low": float(interval.low), f"{name}/high": float(interval.high)}


def _interval(name: str, resampled: np.ndarray) -> dict[str, float]:
    """Return the interval of a figure from its values in bootstrap samples (percentiles)."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {f"{name}/low": float(low), f"{name}/high": float(high)}


def perplexity(losses: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Return the perplexity, exp(loss per token), with its interval over the records (bootstrap percentiles).

    Args:
        losses: [n] sum of the losses of each record's answer tokens, in nats.
        tokens: [n] number of those tokens.

    Returns:
        The values of "perplexity", and with two or more records "perplexity/low" and "perplexity/high".
    """
    from scipy.stats import bootstrap

    def of(losses: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(losses.sum(axis) / tokens.sum(axis)))

    figures = {"perplexity": float(of(losses, tokens))}
    if len(losses) > 1 and np.isfinite(losses).all():
        interval = bootstrap((losses, tokens), of, paired=True, confidence_level=CONFIDENCE, n_resamples=RESAMPLES,
                             batch=max(1, MOST_AT_ONCE // len(losses)), method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
        figures |= {"perplexity/low": float(interval.low), "perplexity/high": float(interval.high)}
    return figures


def of_classes(probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Return the figures of a classifier.

    Args:
        probabilities: [n, labels] the model's probability of each label.
        truth: [n] index of each record's label.
        labels: names of the labels.

    Returns:
        The accuracy with its interval and the majority rate. With at least two labels among the records also the
        balanced accuracy, the macro F1 (over the labels that occur among records or predictions), and the recall of
        each such label unless there are more than `MOST_RECALLS` labels. AUROC (for more than two labels the mean of
        one label against the rest) needs records of every label and finite probabilities. These three have intervals
        if each label among the records has two: DeLong's for the AUROC, percentiles of a bootstrap that draws each
        label's records anew for the others.
    """
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score

    predicted = probabilities.argmax(1)
    present, counts = np.unique(truth, return_counts=True)
    figures = proportion("accuracy", predicted == truth) | {MAJORITY: float(counts.max() / len(truth))}
    if len(present) < 2:
        return figures
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label that is only predicted has no recall; it is left out as documented
        figures["balanced_accuracy"] = float(balanced_accuracy_score(truth, predicted))
        figures["macro_f1"] = float(f1_score(truth, predicted, average="macro"))
    if enough := counts.min() > 1:
        recalls, f1 = _resampled_by_confusion(confusion_matrix(truth, predicted))
        figures |= _interval("balanced_accuracy", recalls) | _interval("macro_f1", f1)
    if len(present) == len(labels) and np.isfinite(probabilities).all():
        scores = probabilities[:, 1] if len(labels) == 2 else probabilities
        figures["auroc"] = float(roc_auc_score(truth, scores, multi_class="ovr"))
        if enough:
            figures |= _auroc_interval(probabilities, truth, figures["auroc"])
    if len(labels) <= MOST_RECALLS:
        for index in present:
            figures |= proportion(f"recall/{labels[index]}", predicted[truth == index] == index)
    return figures


def _resampled_by_confusion(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return balanced accuracy and macro F1 of bootstrap samples that draw the records of each label anew.

    Args:
        confusion: [k, k] number of records by label and prediction, of the labels that occur as either.

    Returns:
        Two arrays [`RESAMPLES`].
    """
    draw = np.random.default_rng(0)
    counts = confusion.sum(1)
    shares = confusion / np.maximum(counts, 1)[:, None]
    shares[counts == 0, 0] = 1  # nothing is drawn of a label that is only predicted
    drawn = draw.multinomial(counts, shares, size=(RESAMPLES, len(counts)))
    hits = np.diagonal(drawn, axis1=1, axis2=2)
    either = np.maximum(drawn.sum(1) + counts, 1)  # records with the label or predicted to have it, twice if both
    occurs = (drawn.sum(1) + counts) > 0
    recalls = (hits / np.maximum(counts, 1))[:, counts > 0].mean(1)
    return recalls, (2 * hits / either).sum(1) / occurs.sum(1)


def _auroc_interval(probabilities: np.ndarray, truth: np.ndarray, auroc: float) -> dict[str, float]:
    """Return the interval of the AUROC: normal, with the variance of DeLong, DeLong and Clarke-Pearson (1988).

    For more than two labels the variance is that of the mean over the labels, each against the rest.

    Args:
        probabilities: [n, labels] the model's probability of each label.
        truth: [n] index of each record's label; every label occurs twice or more.
        auroc: the AUROC.
    """
    from scipy.stats import norm, rankdata

    labels = range(probabilities.shape[1])
    compared = labels[1:] if len(labels) == 2 else labels
    share = np.zeros(len(truth))  # of each record in the AUROC
    for label in compared:
        positive, scores = truth == label, probabilities[:, label]
        ranks, counts = rankdata(scores), (int(positive.sum()), int((~positive).sum()))
        beaten = np.empty(len(truth))  # share of the records of the other side that this one is ranked right against
        beaten[positive] = (ranks[positive] - rankdata(scores[positive])) / counts[1]
        beaten[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / counts[0]
        share += beaten / np.where(positive, *counts) / len(compared)
    variance = sum((truth == label).sum() * share[truth == label].var(ddof=1) for label in labels)
    reach = norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(variance)
    return {"auroc/low": float(max(0, auroc - reach)), "auroc/high": float(min(1, auroc + reach))}
