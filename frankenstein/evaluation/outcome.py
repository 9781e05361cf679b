"""What one row of a results table says about each test item, and the measures made from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frankenstein.evaluation.metrics import Metric, accuracy, average_precision, macro_f1, pearson, spearman
from frankenstein.tasks.registry import Task

# The model rows. Fine-tuned ones first; the others show what fine-tuning and pretraining brought.
FINE_TUNED = ("ternary", "full")
MODELS = (*FINE_TUNED, "pretrained", "random_init")


@dataclass(frozen=True)
class Outcome:
    """One row on one task.

    Attributes:
        items: per test item: `score` (higher = more similar), `prediction` (label), `confidence` (of the prediction).
        settings: what was chosen on dev, plain values.
    """

    items: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """A metric bound to the truth and the prediction of the test items it counts."""

    metric: Metric
    truth: np.ndarray
    predicted: np.ndarray
    counted: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Values (B,) for resample weights (B, n) over all test items."""
        return self.metric(self.truth, self.predicted, weights[:, self.counted])

    def value(self) -> float:
        """The metric on the test items as they are."""
        return float(self(np.ones((1, len(self.counted))))[0])


def measures(task: type[Task], truth: np.ndarray, items: Mapping[str, np.ndarray]) -> dict[str, Measure]:
    """Measures by name, the main one first: ap (given a score), accuracy and macro_f1, or spearman and pearson.

    `ap` is average precision of similar against dissimilar pairs; other labels are left out there, as MTEB does.
    """
    everything = np.ones(len(truth), dtype=bool)
    if not task.labels:
        return {
            "spearman": Measure(spearman, truth, items["score"], everything),
            "pearson": Measure(pearson, truth, items["score"], everything),
        }
    result = {}
    if "score" in items and task.similar is not None:
        counted = (truth == task.similar) | (truth == task.dissimilar)
        positive = truth[counted] == task.similar
        result["ap"] = Measure(average_precision, positive, items["score"][counted], counted)
    for name, metric in (("accuracy", accuracy), ("macro_f1", macro_f1)):
        result[name] = Measure(metric, truth, items["prediction"], everything)
    return result
