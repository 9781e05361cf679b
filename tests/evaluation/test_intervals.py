"""Intervals hold the truth as often as they say, are the same every time, and pair what should be paired."""

import time

import numpy as np
import pytest
from scipy import stats

from frankenstein.evaluation.intervals import bootstrap, interval, mcnemar, paired_difference, resamples
from frankenstein.evaluation.metrics import accuracy, pearson, spearman


def correlated(n: int, rho: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, noise = np.random.default_rng(seed).normal(size=(2, n))
    return x, rho * x + np.sqrt(1 - rho**2) * noise


def test_every_resample_draws_n_items() -> None:
    blocks = list(resamples(50, 300, seed=1))
    assert sum(len(block) for block in blocks) == 300
    assert all((block.sum(axis=1) == 50).all() for block in blocks)


def test_the_block_size_does_not_change_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resamples(40, 90, seed=1)))
    monkeypatch.setattr("frankenstein.evaluation.intervals._BLOCK_CELLS", 400)
    assert (np.concatenate(list(resamples(40, 90, seed=1))) == whole).all()


def test_the_interval_covers_the_true_correlation_about_19_times_in_20() -> None:
    covered = 0
    for seed in range(200):
        x, y = correlated(120, 0.6, seed)
        spread = bootstrap({"r": lambda w, x=x, y=y: pearson(x, y, w)}, 120, 400, seed)
        low, high = interval(spread["r"])
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_the_interval_of_a_mean_agrees_with_theory() -> None:
    truth = np.zeros(1000, dtype=int)
    guesses = (np.arange(1000) % 5 == 0).astype(int)
    low, high = interval(bootstrap({"a": lambda w: accuracy(truth, guesses, w)}, 1000, 4000, 0)["a"])
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert low == pytest.approx(0.8 - half, abs=0.003)
    assert high == pytest.approx(0.8 + half, abs=0.003)


def test_the_same_seed_gives_the_same_distribution_and_another_seed_another() -> None:
    x, y = correlated(100, 0.5, 0)
    one, two, other = (bootstrap({"r": lambda w: spearman(x, y, w)}, 100, 100, seed)["r"] for seed in (5, 5, 6))
    assert (one == two).all()
    assert not (one == other).all()


def test_paired_resampling_sees_a_small_difference_that_lone_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros(1000, dtype=int)
    worse = (rng.random(1000) < 0.4).astype(int)
    better = np.where(rng.random(1000) < 0.05, 0, worse)
    spread = bootstrap(
        {n: lambda w, g=g: accuracy(truth, g, w) for n, g in (("b", better), ("w", worse))}, 1000, 1000, 0
    )
    (low, _), (_, high) = interval(spread["b"]), interval(spread["w"])
    assert low < high
    values = [float((g == truth).mean()) for g in (better, worse)]
    found = paired_difference(*values, spread["b"], spread["w"])
    assert found.difference == pytest.approx(values[0] - values[1])
    assert found.low > 0
    assert found.p < 0.01


def test_a_model_does_not_differ_from_itself() -> None:
    spread = np.random.default_rng(0).normal(size=500)
    found = paired_difference(0.3, 0.3, spread, spread)
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("only_first", "only_second"), [(12, 4), (3, 3), (0, 9), (0, 0), (300, 251)])
def test_mcnemar_equals_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True] * 5)
    second = np.array([False] * only_first + [True] * only_second + [True] * 5)
    wins, losses, p = mcnemar(first, second)
    assert (wins, losses) == (only_first, only_second)
    n = only_first + only_second
    assert p == pytest.approx(stats.binomtest(only_first, n, 0.5).pvalue if n else 1.0)


def test_a_thousand_resamples_of_five_thousand_items_are_quick() -> None:
    x, y = correlated(5000, 0.5, 0)
    start = time.process_time()
    bootstrap({"r": lambda w: pearson(x, y, w)}, 5000, 1000, 0)
    assert time.process_time() - start < 5
