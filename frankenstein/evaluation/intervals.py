"""Uncertainty of a score, and of the difference of two models on the same items.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval) and 16 (test);
McNemar 1947, https://doi.org/10.1007/BF02295996 (exact binomial form).
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

# Cells of one block of resample weights: 4M float64 are 32 MB.
_BLOCK_CELLS = 4_000_000


def resamples(n: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (b, n) of bootstrap weights, `samples` rows in all: how often each of n items was drawn in n draws."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = max(1, _BLOCK_CELLS // n)
    for start in range(0, samples, rows):
        b = min(rows, samples - start)
        drawn = generator.integers(0, n, size=(b, n)) + n * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n).astype(float)


def bootstrap(
    measures: Mapping[Key, Callable[[np.ndarray], np.ndarray]], n: int, samples: int, seed: int
) -> dict[Key, np.ndarray]:
    """Distribution (samples,) of every measure; all see the same resamples, so differences of them are paired.

    Args: measures: each from weights (b, n) to values (b,).
    """
    parts: dict[Key, list[np.ndarray]] = {name: [] for name in measures}
    for weights in resamples(n, samples, seed):
        for name, measure in measures.items():
            parts[name].append(measure(weights))
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def interval(distribution: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval."""
    low, high = np.quantile(distribution, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """How much better one model scored than another on the same items: 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float

    def to_json(self) -> dict[str, float]:
        """Rounded values by name."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def paired_difference(
    value: float, other: float, distribution: np.ndarray, other_distribution: np.ndarray
) -> Difference:
    """Difference `value - other`, from two distributions over the same resamples."""
    gaps = distribution - other_distribution
    tail = 1 + min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
    return Difference(value - other, *interval(gaps), p=min(1.0, 2 * tail / (len(gaps) + 1)))


def mcnemar(correct: np.ndarray, other_correct: np.ndarray) -> tuple[int, int, float]:
    """(items only the first model got right, items only the other did, exact two-sided p of that split)."""
    wins = int((correct & ~other_correct).sum())
    losses = int((~correct & other_correct).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return wins, losses, min(1.0, 2 * tail / 2**n)
