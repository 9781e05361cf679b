"""Metrics against scipy and scikit-learn, and resample weights against items that are really repeated."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from frankenstein.evaluation.metrics import (
    accuracy,
    average_precision,
    expected_calibration_error,
    macro_f1,
    pearson,
    point,
    ranks,
    reliability,
    spearman,
)

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=200)
TIED = RNG.integers(0, 5, size=200) / 2
GOLD = TIED + RNG.normal(size=200)
LABELS, GUESSES = RNG.integers(0, 3, size=200), RNG.integers(0, 3, size=200)


@pytest.mark.parametrize(("x", "y"), [(GOLD, SCORES), (GOLD, TIED), (TIED, np.round(SCORES))])
def test_correlations_equal_scipy_also_with_ties(x: np.ndarray, y: np.ndarray) -> None:
    assert point(pearson, x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert point(spearman, x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_ranks_of_equal_values_are_averaged() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0]), np.ones((1, 4)))[0].tolist() == [3.5, 1.0, 3.5, 2.0]
    assert ranks(TIED, np.ones((1, 200)))[0].tolist() == stats.rankdata(TIED).tolist()


def test_a_constant_side_gives_correlation_zero() -> None:
    assert point(pearson, GOLD, np.full(200, 0.3)) == 0.0
    assert point(spearman, np.full(200, 0.1), GOLD) == 0.0


def test_classification_metrics_equal_scikit_learn() -> None:
    assert point(accuracy, LABELS, GUESSES) == pytest.approx(sk.accuracy_score(LABELS, GUESSES))
    assert point(macro_f1, LABELS, GUESSES) == pytest.approx(sk.f1_score(LABELS, GUESSES, average="macro"))
    one_label = np.zeros(200, dtype=int)
    expected = sk.f1_score(LABELS, one_label, average="macro", zero_division=0)
    assert point(macro_f1, LABELS, one_label) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [SCORES, TIED, np.zeros(200)], ids=["distinct", "tied", "constant"])
def test_average_precision_equals_scikit_learn_also_with_ties(scores: np.ndarray) -> None:
    positive = LABELS == 1
    expected = sk.average_precision_score(positive, scores)
    assert point(average_precision, positive, scores) == pytest.approx(expected)


def test_average_precision_of_a_constant_score_is_the_share_of_positives() -> None:
    assert point(average_precision, np.array([1, 0, 0, 1, 0]), np.zeros(5)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("metric", "truth", "predicted"),
    [
        (accuracy, LABELS, GUESSES), (macro_f1, LABELS, GUESSES), (average_precision, LABELS == 1, TIED),
        (pearson, GOLD, SCORES), (spearman, GOLD, TIED),
    ],
    ids=["accuracy", "macro_f1", "average_precision", "pearson", "spearman"],
)  # fmt: skip
def test_weights_mean_the_same_as_repeating_items(metric, truth: np.ndarray, predicted: np.ndarray) -> None:
    weights = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), size=7).astype(float)
    values = metric(truth, predicted, weights)
    for row, value in zip(weights.astype(int), values, strict=True):
        items = np.repeat(np.arange(200), row)
        assert value == pytest.approx(point(metric, truth[items], predicted[items]), abs=1e-12)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.65, 0.65])
    correct = np.array([True, True, True, False])
    assert expected_calibration_error(correct, confidence) == pytest.approx((2 * 0.05 + 2 * 0.15) / 4)
    assert reliability(correct, confidence) == [(2, 0.5, pytest.approx(0.65)), (2, 1.0, pytest.approx(0.95))]


def test_full_confidence_falls_in_the_last_bin() -> None:
    assert expected_calibration_error(np.array([True]), np.array([1.0])) == 0.0
