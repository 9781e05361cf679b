"""The probe protocol: a linear model on frozen vectors of a pair.

Classes: multinomial logistic regression on [u, v, |u-v|, u*v]; graded tasks: ridge regression on [|u-v|, u*v].
Source: SentEval, Conneau and Kiela 2018, https://arxiv.org/abs/1803.05449. The L2 strength is chosen on dev, or by
5-fold cross-validation where the task has no training split and the probe is fitted on dev itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from frankenstein.evaluation.metrics import point, spearman
from frankenstein.evaluation.outcome import Outcome
from frankenstein.evaluation.splits import Splits

# Inverse L2 strengths, as scikit-learn's C: the penalty is |W|^2 / (2 C) beside the summed loss.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
FOLDS = 5
# L-BFGS iterations at each strength; a bound on time, seldom reached.
_ITERATIONS = 100

Vectors = Callable[[list[str]], np.ndarray]
WeightPath = list[np.ndarray]


@dataclass(frozen=True)
class Standardizer:
    """Column means and scales of the fitted pairs; a constant column keeps scale 1."""

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> "Standardizer":
        """From features (n, F)."""
        scale = x.std(axis=0)
        return cls(x.mean(axis=0), np.where(scale > 1e-7, scale, 1).astype(x.dtype))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Features (n, F) with mean 0 and variance 1 on the fitted pairs."""
        return (x - self.mean) / self.scale


def pair_features(first: np.ndarray, second: np.ndarray, graded: bool) -> np.ndarray:
    """(n, 2D) for graded tasks, (n, 4D) for classes, from vectors (n, D)."""
    relations = [np.abs(first - second), first * second]
    return np.concatenate(relations if graded else [first, second, *relations], axis=1)


def logistic_path(
    x: np.ndarray, labels: np.ndarray, classes: int, strengths: tuple[float, ...] = STRENGTHS
) -> WeightPath:
    """Weights (F + 1, classes) of multinomial logistic regression at each strength, the last row the free intercept.

    Mean cross-entropy + |W|^2 / (2 C n) by L-BFGS, each strength started from the one before.
    """
    from scipy.optimize import minimize

    n, width = x.shape
    truth = np.eye(classes, dtype=x.dtype)[labels]
    weights, path = np.zeros((width + 1) * classes), []

    def loss(flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        w = flat.reshape(width + 1, classes)
        log_p = _log_softmax(_affine(x, w))
        error = (np.exp(log_p) - truth) / n
        gradient = np.vstack([x.T @ error + penalty * w[:-1], error.sum(axis=0)])
        value = penalty / 2 * np.square(w[:-1]).sum() - (log_p * truth).sum(dtype=np.float64) / n
        return float(value), gradient.ravel()

    for strength in strengths:
        found = minimize(
            loss, weights, args=(1 / (strength * n),), jac=True, method="L-BFGS-B",
            options={"maxiter": _ITERATIONS, "ftol": 1e-7, "gtol": 1e-6},
        )  # fmt: skip
        weights = found.x
        path.append(weights.reshape(width + 1, classes))
    return path


def ridge_path(x: np.ndarray, scores: np.ndarray, strengths: tuple[float, ...] = STRENGTHS) -> WeightPath:
    """Weights (F + 1, 1) of ridge regression at each strength: squared errors / 2 + |w|^2 / (2 C); x is centred."""
    features, mean = x.astype(np.float64), scores.mean()
    gram, moment = features.T @ features, features.T @ (scores - mean)
    identity = np.eye(len(gram))
    solutions = (np.linalg.solve(gram + identity / strength, moment) for strength in strengths)
    return [np.append(w, mean)[:, None] for w in solutions]


def predict(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Class probabilities (n, classes), or scores (n, 1) from one column of weights."""
    out = _affine(x, weights)
    return out if out.shape[1] == 1 else np.exp(_log_softmax(out))


def _affine(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    w = weights.astype(x.dtype)
    return x @ w[:-1] + w[-1]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def probe(splits: Splits, vectors: Vectors, seed: int) -> Outcome:
    """Fit on the training pairs, choose the strength, predict the test pairs.

    Args: vectors: from sentences to (n, D) float32.
    """
    graded = not splits.task.labels
    x, dev_x, test_x = (
        pair_features(vectors(pairs.first), vectors(pairs.second), graded)
        for pairs in (splits.fit, splits.dev, splits.test)
    )
    standard = Standardizer.fit(x)
    path = _fit(splits, standard(x), splits.fit.targets)
    if splits.fit_is_dev:
        quality = _cross_validated(splits, x, seed)
    else:
        quality = np.array([_quality(splits, standard(dev_x), w, splits.dev.targets) for w in path])
    best = int(np.argmax(quality))
    predicted = predict(standard(test_x), path[best])
    settings = {
        "C": STRENGTHS[best],
        "C_chosen_by": f"{FOLDS}-fold cross-validation on dev" if splits.fit_is_dev else splits.chosen_on,
        "dev_quality": round(float(quality[best]), 6),
        "trained_on": splits.trained_on,
        "training_pairs": len(splits.fit),
    }
    if graded:
        return Outcome({"score": predicted[:, 0]}, settings)
    return Outcome({"prediction": predicted.argmax(axis=1), "confidence": predicted.max(axis=1)}, settings)


def _fit(splits: Splits, x: np.ndarray, targets: np.ndarray) -> WeightPath:
    return logistic_path(x, targets, len(splits.task.labels)) if splits.task.labels else ridge_path(x, targets)


def _quality(splits: Splits, x: np.ndarray, weights: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy, or Spearman's correlation for a graded task."""
    predicted = predict(x, weights)
    if not splits.task.labels:
        return point(spearman, targets, predicted[:, 0])
    return float((predicted.argmax(axis=1) == targets).mean())


def _cross_validated(splits: Splits, x: np.ndarray, seed: int) -> np.ndarray:
    """Mean quality of each strength over the folds, each scored by a probe that has not seen it."""
    targets, scores = splits.fit.targets, []
    for inside, outside in folds(len(x), seed):
        standard = Standardizer.fit(x[inside])
        path = _fit(splits, standard(x[inside]), targets[inside])
        scores.append([_quality(splits, standard(x[outside]), w, targets[outside]) for w in path])
    return np.mean(scores, axis=0)


def folds(n: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(fitted, scored) positions of each of 5 seeded folds."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(n)
    for fold in range(FOLDS):
        scored = np.arange(n) % FOLDS == fold
        yield np.sort(order[~scored]), np.sort(order[scored])
