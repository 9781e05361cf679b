"""The embed protocol: a pair's cosine is its score; labels come from thresholds on it that are chosen on dev pairs."""

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from frankenstein.evaluation.outcome import Outcome
from frankenstein.tasks.registry import Task

# Sentences that the geometry of the vectors is measured on; all pairs of them are compared.
_GEOMETRY_SENTENCES = 1000


@dataclass(frozen=True)
class Thresholds:
    """Ascending cuts between the labels `order`: below cuts[0] lies order[0]; a score at a cut belongs above it."""

    cuts: tuple[float, ...]
    order: tuple[int, ...]

    def classify(self, scores: np.ndarray) -> np.ndarray:
        """Labels (n,) int64 of scores (n,)."""
        return np.asarray(self.order)[np.searchsorted(self.cuts, scores, side="right")]


def choose_thresholds(task: type[Task], scores: np.ndarray, labels: np.ndarray) -> Thresholds:
    """The cuts with the most correct dev labels, by exact search.

    The similar label is on top; where two or more labels lie below it, dev decides their order too.
    """
    similar = len(task.labels) - 1 if task.similar is None else task.similar
    below = [label for label in range(len(task.labels)) if label != similar]
    candidates = [_best_cuts(scores, labels, (*order, similar)) for order in permutations(below)]
    return max(candidates, key=lambda found: found[0])[1]


def _best_cuts(scores: np.ndarray, labels: np.ndarray, order: tuple[int, ...]) -> tuple[int, Thresholds]:
    """(correct dev items, thresholds) of the best split of the sorted scores into runs, one a label in `order`.

    best_k[i] = max over cuts j <= i of best_{k-1}[j] + hits of label k in sorted items j..i: one pass a label.
    """
    ranked = np.argsort(scores, kind="stable")
    values = scores[ranked].astype(float)
    allowed = np.concatenate([[True], values[1:] > values[:-1], [True]])
    hits = [np.concatenate([[0], np.cumsum(labels[ranked] == label)]) for label in order]
    best, choices = hits[0].astype(float), []
    for hit in hits[1:]:
        gain = np.where(allowed, best - hit, -np.inf)
        highest = np.maximum.accumulate(gain)
        fresh = np.where(gain >= highest, np.arange(len(gain)), 0)
        choices.append(np.maximum.accumulate(fresh))
        best = highest + hit
    places = [len(values)]
    for choice in reversed(choices):
        places.insert(0, int(choice[places[0]]))
    return int(best[-1]), Thresholds(tuple(_between(values, place) for place in places[:-1]), order)


def _between(values: np.ndarray, place: int) -> float:
    """A cut with `place` of the ascending values below it."""
    if place == 0:
        return float(values[0]) - 1e-6
    if place == len(values):
        return float(values[-1]) + 1e-6
    return float(values[place - 1] + values[place]) / 2


def from_scores(task: type[Task], dev_scores: np.ndarray, dev_targets: np.ndarray, test_scores: np.ndarray) -> Outcome:
    """The embed outcome of any pair score; test targets are not among its inputs."""
    if not task.labels:
        return Outcome({"score": test_scores})
    chosen = choose_thresholds(task, dev_scores, dev_targets)
    dev_accuracy = float((chosen.classify(dev_scores) == dev_targets).mean())
    settings = {
        "thresholds": [round(cut, 6) for cut in chosen.cuts],
        "labels_from_below": [task.labels[label] for label in chosen.order],
        "dev_accuracy": round(dev_accuracy, 6),
    }
    return Outcome({"score": test_scores, "prediction": chosen.classify(test_scores)}, settings)


def threshold_curve(
    task: type[Task], scores: np.ndarray, labels: np.ndarray, points: int = 61
) -> tuple[float, np.ndarray]:
    """(chosen upper cut, ascending rows (cut, dev accuracy)) as the upper cut moves and the lower ones stay."""
    chosen = choose_thresholds(task, scores, labels)
    floor = chosen.cuts[-2] if len(chosen.cuts) > 1 else scores.min()
    grid = np.union1d(np.linspace(max(floor, scores.min()), scores.max(), points), chosen.cuts[-1])
    moved = (Thresholds((*chosen.cuts[:-1], cut), chosen.order) for cut in grid)
    return chosen.cuts[-1], np.column_stack([grid, [(m.classify(scores) == labels).mean() for m in moved]])


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine (n,) float64 of the rows of two (n, D) arrays; 0 where a vector is zero."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.divide((first * second).sum(axis=1), norms, out=np.zeros(len(first)), where=norms > 0)


def geometry(vectors: np.ndarray) -> dict[str, Any]:
    """How the first distinct test sentences (S, D) lie on the sphere: mean cosine and uniformity of all pairs of them.

    anisotropy = mean cosine of two different sentences (0 for even spread, 1 for one direction);
    uniformity = log mean exp(-2 |u - v|^2) of unit vectors, lower is more even.
    Source: Wang and Isola 2020, eq. 5, https://arxiv.org/abs/2005.10242; Ethayarajh 2019, https://arxiv.org/abs/1909.00512.
    """
    norms = np.linalg.norm(vectors, axis=1)
    unit = (vectors[norms > 0] / norms[norms > 0, None])[:_GEOMETRY_SENTENCES].astype(np.float64)
    upper = np.triu_indices(len(unit), k=1)
    cosines = (unit @ unit.T)[upper]
    facts = {"sentences": len(unit), "zero_vectors": int((norms == 0).sum())}
    if len(cosines) == 0:
        return facts
    uniformity = float(np.log(np.exp(-4 * (1 - cosines)).mean()))
    return {**facts, "anisotropy": round(float(cosines.mean()), 6), "uniformity": round(uniformity, 6)}


def alignment(cosines: np.ndarray, similar: np.ndarray) -> float | None:
    """Mean squared distance of the unit vectors of similar pairs (Wang and Isola 2020, eq. 4); None without any."""
    return round(float((2 - 2 * cosines[similar]).mean()), 6) if similar.any() else None
