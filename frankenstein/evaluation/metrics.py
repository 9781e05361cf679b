"""Scores of predictions, on the items themselves or on many bootstrap resamples at once.

A resample is a row of `weights` (B, n): how often it holds each of the n items. Every metric takes the weights and
returns one value a resample, (B,); `point` gives the plain value. Both come from the same code, so an interval cannot
belong to another definition than the number beside it.
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def point(metric: Metric, truth: np.ndarray, predicted: np.ndarray) -> float:
    """The metric on the items as they are, each once."""
    return float(metric(truth, predicted, np.ones((1, len(truth))))[0])


def accuracy(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of items (n,) whose predicted label is the true one."""
    return _share(weights @ (truth == predicted).astype(float), weights.sum(axis=1))


def macro_f1(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the labels that occur in truth or prediction of F1 = 2 TP / (true + predicted); 0 where that is 0/0."""
    scores = []
    for label in np.union1d(truth, predicted):
        is_true, is_predicted = truth == label, predicted == label
        hits = weights @ (is_true & is_predicted).astype(float)
        scores.append(_share(2 * hits, weights @ (is_true.astype(float) + is_predicted)))
    return np.mean(scores, axis=0)


def average_precision(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over distinct scores, from the highest, of (recall gained there) x (precision down to there).

    Source: scikit-learn's average_precision_score (not interpolated), the `ap` of MTEB's pair classification.
    Args: truth: (n,), true or non-zero for positives; scores: (n,), higher means more likely positive.
    """
    order, starts = _groups(-scores)
    sorted_weights = weights[:, order]
    held = np.add.reduceat(sorted_weights, starts, axis=1)
    positives = np.add.reduceat(sorted_weights * (truth[order] != 0), starts, axis=1)
    precision = _share(np.cumsum(positives, axis=1), np.cumsum(held, axis=1))
    return _share((precision * positives).sum(axis=1), positives.sum(axis=1))


def pearson(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Linear correlation; 0 where one side is constant, which leaves it undefined."""
    return _correlation(truth - truth.mean(), scores - scores.mean(), weights)


def spearman(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Linear correlation of the ranks within each resample, ties sharing their mean; 0 where one side is constant."""
    return _correlation(ranks(truth, weights), ranks(scores, weights), weights)


def ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank (B, n), from 1, of each item in each resample; equal values share the mean of their ranks."""
    order, starts = _groups(values)
    held = np.add.reduceat(weights[:, order], starts, axis=1)
    mean_rank = np.cumsum(held, axis=1) - (held - 1) / 2
    sizes = np.diff(np.append(starts, len(values)))
    result = np.empty(weights.shape)
    result[:, order] = np.repeat(mean_rank, sizes, axis=1)
    return result


def expected_calibration_error(correct: np.ndarray, confidence: np.ndarray, bins: int = 10) -> float:
    """Mean over items of |accuracy - mean confidence| of the item's confidence bin; bins of equal width on [0, 1].

    Source: Guo et al. 2017, eq. 3, https://arxiv.org/abs/1706.04599.
    """
    return float(sum(n * abs(share - mean) for n, share, mean in reliability(correct, confidence, bins)) / len(correct))


def reliability(correct: np.ndarray, confidence: np.ndarray, bins: int = 10) -> list[tuple[int, float, float]]:
    """(items, accuracy, mean confidence) of each confidence bin that holds an item."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    filled = [(place == b) for b in range(bins) if (place == b).any()]
    return [(int(b.sum()), float(correct[b].mean()), float(confidence[b].mean())) for b in filled]


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending order of the values, and where in that order each run of equal values starts."""
    order = np.argsort(values, kind="stable")
    return order, np.flatnonzero(np.append(True, np.diff(values[order]) != 0))


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted linear correlation of x and y, each (n,) or (B, n)."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    noise = 1e-12 * total[:, 0] * np.abs(x).max(axis=1) * np.abs(y).max(axis=1)
    return np.where(spread > noise, _share((weights * x * y).sum(axis=1), spread), 0.0)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
