"""One protocol on one task: every row's metrics with intervals, and paired comparisons between rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from frankenstein.evaluation.intervals import bootstrap, interval, mcnemar, paired_difference
from frankenstein.evaluation.metrics import expected_calibration_error
from frankenstein.evaluation.outcome import FINE_TUNED, MODELS, Measure, Outcome, measures
from frankenstein.evaluation.splits import Splits

DIGITS = 4


@dataclass(frozen=True)
class Table:
    """Outcomes of every row on one task under one protocol; `curves` holds dev accuracy over the upper cut, by row."""

    protocol: str
    splits: Splits
    outcomes: dict[str, Outcome]
    curves: dict[str, tuple[float, np.ndarray]]

    def measures(self, row: str) -> dict[str, Measure]:
        """Measures of a row by name, the main one first."""
        return measures(self.splits.task, self.splits.test.targets, self.outcomes[row].items)

    @property
    def models(self) -> list[str]:
        """The fine-tuned models that are there."""
        return [row for row in FINE_TUNED if row in self.outcomes]

    @property
    def baselines(self) -> list[str]:
        """Rows that no training of ours went into."""
        return [row for row in self.outcomes if row not in MODELS] + [r for r in ("random_init",) if r in self.outcomes]

    @property
    def main(self) -> str:
        """Name of the metric that ranks the rows."""
        return next(iter(self.measures(next(iter(self.outcomes)))))


def score(table: Table, samples: int, seed: int) -> dict[str, Any]:
    """Plain values: `main` metric, `rows` (metrics with intervals, settings), `best_baseline`, `comparisons`.

    Args: samples: bootstrap resamples; all rows of a table see the same ones.
    """
    bound = {(row, name): m for row in table.outcomes for name, m in table.measures(row).items()}
    values = {key: measure.value() for key, measure in bound.items()}
    spread = bootstrap(bound, len(table.splits.test), samples, seed)
    rows: dict[str, Any] = {}
    for (row, name), value in values.items():
        entry = rows.setdefault(row, {"metrics": {}, "settings": table.outcomes[row].settings})
        entry["metrics"][name] = {"value": round(value, 6), "ci95": [round(x, 6) for x in interval(spread[row, name])]}
    for row, outcome in table.outcomes.items():
        if "confidence" in outcome.items:
            error = expected_calibration_error(_correct(table, row), outcome.items["confidence"])
            rows[row]["calibration_error"] = round(error, 6)
    best = max(table.baselines, key=lambda row: values[row, table.main])
    pairs = [(row, best) for row in table.models]
    if len(table.models) == len(FINE_TUNED):
        pairs.insert(0, FINE_TUNED)
    comparisons = [_compare(table, pair, values, spread) for pair in pairs]
    return {"main": table.main, "rows": rows, "best_baseline": best, "comparisons": comparisons}


def _compare(
    table: Table, pair: tuple[str, str], values: dict[tuple[str, str], float], spread: dict[tuple[str, str], np.ndarray]
) -> dict[str, Any]:
    """The paired differences, first row minus second, of every metric that both rows have."""
    first, second = pair
    found: dict[str, Any] = {"first": first, "second": second, "differences": {}}
    for name in table.measures(first):
        a, b = (first, name), (second, name)
        if b in values:
            difference = paired_difference(values[a], values[b], spread[a], spread[b])
            found["differences"][name] = difference.to_json()
    if table.splits.task.labels:
        wins, losses, p = mcnemar(_correct(table, first), _correct(table, second))
        found["mcnemar"] = {"only_first_correct": wins, "only_second_correct": losses, "p": round(p, 6)}
    return found


def _correct(table: Table, row: str) -> np.ndarray:
    return np.asarray(table.outcomes[row].items["prediction"] == table.splits.test.targets)


def headline(scored: dict[str, Any]) -> dict[str, Any]:
    """{row: {metric: value, "ci95": interval of the main metric}}, short enough for `dvc metrics show`."""
    return {
        row: {
            **{name: round(metric["value"], DIGITS) for name, metric in entry["metrics"].items()},
            "ci95": [round(x, DIGITS) for x in entry["metrics"][scored["main"]]["ci95"]],
        }
        for row, entry in scored["rows"].items()
        if scored["main"] in entry["metrics"]
    }
