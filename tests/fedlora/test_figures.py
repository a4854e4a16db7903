"""The figures of an evaluation, against what they are by definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from fedlora.figures import MAJORITY, MOST_RECALLS, headline, of_classes, perplexity, proportion

LABELS = ("no", "yes", "perhaps")
TRUTH = np.array([0, 0, 0, 0, 1, 1, 2, 2])


def certain(predicted, labels=3):
    """Return probabilities of a model that is sure of its predictions."""
    return np.eye(labels)[predicted]


def test_figures_of_three_classes_are_those_of_the_textbook():
    figures = of_classes(certain([0, 0, 0, 1, 1, 0, 2, 1]), TRUTH, LABELS)
    assert figures["accuracy"] == 5 / 8 and figures[MAJORITY] == 4 / 8
    assert (figures["recall/no"], figures["recall/yes"], figures["recall/perhaps"]) == (3 / 4, 1 / 2, 1 / 2)
    assert figures["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    no, yes, perhaps = 2 * 3 / (4 + 4), 2 * 1 / (2 + 3), 2 * 1 / (2 + 1)
    assert figures["macro_f1"] == pytest.approx((no + yes + perhaps) / 3)
    assert figures["accuracy/low"] < figures["accuracy"] < figures["accuracy/high"]


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    truth, scores = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.6, 0.5, 0.7, 0.9])
    figures = of_classes(np.stack([1 - scores, scores], 1), truth, ("no", "yes"))
    assert figures["auroc"] == pytest.approx(5 / 6)


def test_a_model_that_predicts_one_label_is_at_the_majority_rate_with_chance_elsewhere():
    figures = of_classes(certain(np.zeros(8, int)), TRUTH, LABELS)
    assert figures["accuracy"] == figures[MAJORITY] == 0.5
    assert figures["balanced_accuracy"] == pytest.approx(1 / 3) and figures["auroc"] == 0.5


def test_figures_without_a_meaning_are_left_out():
    one_label = of_classes(certain([0, 1, 0]), np.array([0, 0, 0]), LABELS)
    assert set(headline(one_label)) == {"accuracy"} and one_label[MAJORITY] == 1
    no_perhaps = of_classes(certain([0, 2, 1]), np.array([0, 1, 1]), LABELS)
    assert set(headline(no_perhaps)) == {"accuracy", "balanced_accuracy", "macro_f1"}
    assert not any("perhaps" in name for name in no_perhaps)
    diverged = of_classes(np.full((8, 3), np.nan), TRUTH, LABELS)
    assert "auroc" not in diverged and np.isfinite(list(diverged.values())).all()
    many = MOST_RECALLS + 1
    assert not any(name.startswith("recall") for name in of_classes(
        certain(np.arange(many), many), np.arange(many), [str(i) for i in range(many)]))


@pytest.mark.parametrize("labels", [2, 3])
def test_intervals_of_a_classifier_s_figures_are_those_of_a_bootstrap_with_scikit_learn(labels):
    rng = np.random.default_rng(labels)
    truth = np.sort(rng.integers(0, labels, 300))
    scores = rng.normal(size=(300, labels)).round(1)  # with ties
    scores[np.arange(300), truth] += 1
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    places = [np.flatnonzero(truth == label) for label in range(labels)]
    resampled = {"balanced_accuracy": [], "macro_f1": [], "auroc": []}
    for _ in range(400):
        drawn = np.concatenate([rng.choice(of_label, len(of_label)) for of_label in places])
        predicted, shown = probabilities[drawn].argmax(1), probabilities[drawn]
        resampled["balanced_accuracy"].append(balanced_accuracy_score(truth[drawn], predicted))
        resampled["macro_f1"].append(f1_score(truth[drawn], predicted, average="macro"))
        resampled["auroc"].append(
            roc_auc_score(truth[drawn], shown[:, 1] if labels == 2 else shown, multi_class="ovr"))
    figures = of_classes(probabilities, truth, LABELS[:labels])
    for name, values in resampled.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert figures[f"{name}/low"] == pytest.approx(low, abs=0.015), name
        assert figures[f"{name}/high"] == pytest.approx(high, abs=0.015), name


def test_one_record_of_a_label_gives_no_interval_but_of_the_accuracy():
    figures = of_classes(certain([0, 0, 1]), np.array([0, 0, 1]), ("no", "yes"))
    assert figures["auroc"] == figures["macro_f1"] == 1
    assert [name for name in figures if name.endswith("/low") and not name.startswith("recall")] == ["accuracy/low"]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_an_interval_holds_its_proportion_and_stays_within_0_and_1(hits):
    figures = proportion("share", np.array(hits))
    assert 0 <= figures["share/low"] <= figures["share"] <= figures["share/high"] <= 1
    assert figures["share"] == sum(hits) / len(hits)


def test_the_interval_of_a_proportion_is_wilsons():
    figures = proportion("share", np.arange(100) < 80)
    z, n, p = 1.959964, 100, 0.8
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert figures["share/low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-6)
    assert figures["share/high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-6)


def test_perplexity_has_an_interval_that_narrows_with_the_records_and_repeats():
    rng = np.random.default_rng(0)
    widths = []
    for count in (20, 2000):
        tokens = rng.integers(1, 30, count).astype(float)
        losses = tokens * rng.normal(1, 0.2, count)
        figures = perplexity(losses, tokens)
        assert figures == perplexity(losses, tokens)
        assert figures["perplexity"] == pytest.approx(np.exp(losses.sum() / tokens.sum()))
        assert figures["perplexity/low"] < figures["perplexity"] < figures["perplexity/high"]
        widths.append(figures["perplexity/high"] - figures["perplexity/low"])
    assert widths[1] < widths[0] / 5
    assert perplexity(np.array([9e5]), np.array([1.0])) == {"perplexity": np.inf}
