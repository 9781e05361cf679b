"""Properties that every registered task has, and how the protocols score perfect and ignorant vectors on it."""

import numpy as np
import pytest

from frankenstein.evaluation.evaluate import score_rows
from frankenstein.evaluation.options import EvaluateOptions
from frankenstein.tasks.registry import TASKS
from tests.evaluation.toy import ToyEncoder, noise, toy_splits

every_task = pytest.mark.parametrize("name", list(TASKS))
OPTIONS = EvaluateOptions(bootstrap_samples=100)


@every_task
def test_labels_or_a_score_range_and_not_both(name: str) -> None:
    task = TASKS[name]
    assert bool(task.labels) != (task.score_range is not None)
    assert len(set(task.labels)) == len(task.labels)
    assert task.column() == ("label" if task.labels else "score")


@every_task
def test_there_is_a_cosine_for_every_target_and_the_similar_end_asks_for_the_highest(name: str) -> None:
    task = TASKS[name]
    assert len(task.targets) == (len(task.labels) or 2)
    assert all(-1 <= target <= 1 for target in task.targets)
    if task.score_range is not None:
        low, high = (task.cosine_target(value) for value in task.score_range)
        assert low < task.cosine_target(sum(task.score_range) / 2) < high
    else:
        assert task.similar is not None
        assert task.dissimilar is not None
        assert task.cosine_target(task.similar) == max(task.targets)
        assert task.cosine_target(task.dissimilar) == min(task.targets)


def scores(name: str, encode, fit_on_dev: bool = False) -> dict[str, dict[str, float]]:
    """{protocol: {metric: value}} of one model."""
    splits = toy_splits(name, fit_on_dev=fit_on_dev)
    rows = [("full", ToyEncoder(splits) if encode is ToyEncoder else encode)]
    facts = score_rows(rows, [splits], OPTIONS, seed=0).facts["protocols"]
    found = {protocol: facts[protocol]["tasks"][name]["rows"]["full"]["metrics"] for protocol in facts}
    return {protocol: {metric: v["value"] for metric, v in metrics.items()} for protocol, metrics in found.items()}


@every_task
@pytest.mark.parametrize("fit_on_dev", [False, True], ids=["train", "dev"])
def test_perfect_vectors_score_one(name: str, fit_on_dev: bool) -> None:
    found = scores(name, ToyEncoder, fit_on_dev)
    assert all(value == pytest.approx(1.0, abs=1e-4) for value in found["embed"].values())
    assert all(value > 0.95 for value in found["probe"].values())


@every_task
def test_ignorant_vectors_score_like_chance(name: str) -> None:
    found = scores(name, noise)
    chance = 1 / len(TASKS[name].labels) if TASKS[name].labels else 0.0
    for protocol in found.values():
        for metric, value in protocol.items():
            expected = 0.5 if metric == "ap" else chance
            assert abs(value - expected) < 0.2, (metric, value)


@every_task
def test_every_test_pair_is_counted_once(name: str) -> None:
    splits = toy_splits(name, n=60)
    for table in score_rows([("full", noise)], [splits], OPTIONS, seed=0).tables:
        for outcome in table.outcomes.values():
            assert {len(values) for values in outcome.items.values()} == {60}
            assert all(np.isfinite(values).all() for values in outcome.items.values())
