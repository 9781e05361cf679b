"""The free baselines: what they should know, and what they must not see."""

import dataclasses

import numpy as np
import pytest

from frankenstein.evaluation.baselines import embed_baselines, probe_baselines
from frankenstein.evaluation.outcome import Outcome, measures
from frankenstein.evaluation.splits import Splits
from frankenstein.tasks.registry import TASKS
from frankenstein.text.pairs import Pairs
from tests.evaluation.toy import toy_splits

WORDS = ("casa", "perro", "libro", "mesa", "verde", "rojo", "come", "lee", "alto", "bajo")


def spoken(task: str, n: int, seed: int) -> Pairs:
    """Similar pairs share their words; the last word of the second sentence gives the label away 8 times in 10."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % 2 if TASKS[task].labels else rng.uniform(0, 5, n)
    high = targets >= (1 if TASKS[task].labels else 2.5)
    first, second = [], []
    for similar in high:
        words = rng.permutation(WORDS)
        first.append(" ".join(words[:4]))
        hint = "si" if similar == (rng.random() < 0.8) else "no"
        second.append(" ".join([*(words[:4] if similar else words[5:9]), hint]))
    return Pairs([str(i) for i in range(n)], first, second, targets)


def splits(task: str) -> Splits:
    fit, dev, test = (spoken(task, 120, seed) for seed in range(3))
    return Splits(task, TASKS[task], fit, dev, test, "train", "dev")


def value(task: Splits, outcome: Outcome, metric: str) -> float:
    return measures(task.task, task.test.targets, outcome.items)[metric].value()


def test_majority_is_the_most_frequent_fitted_label() -> None:
    task = toy_splits("xnli", n=100)
    rows = embed_baselines(task)
    assert set(rows["majority"].items["prediction"]) == {0}
    assert value(task, rows["majority"], "accuracy") == pytest.approx((task.test.targets == 0).mean())
    assert value(task, rows["majority"], "ap") == pytest.approx(34 / 67)


def test_shared_words_are_seen_by_the_cosine_baselines() -> None:
    for name in ("pawsx", "stsb"):
        task = splits(name)
        rows = embed_baselines(task)
        main = "ap" if name == "pawsx" else "spearman"
        assert value(task, rows["tfidf_word"], main) > 0.75
        assert value(task, rows["tfidf_char"], main) > 0.75


def test_hypothesis_only_finds_the_hint_and_no_more() -> None:
    task = splits("pawsx")
    rows = probe_baselines(task)
    assert 0.7 < value(task, rows["hypothesis_only"], "accuracy") < 0.92
    assert value(task, rows["tfidf_logreg"], "accuracy") > value(task, rows["hypothesis_only"], "accuracy")
    assert rows["tfidf_logreg"].settings["trained_on"] == "train"


def test_a_graded_task_has_no_logistic_row() -> None:
    assert list(probe_baselines(splits("stsb"))) == ["majority", "tfidf_char"]


def test_test_sentences_and_labels_do_not_change_the_fit() -> None:
    """A test pair scores the same, whatever stands beside it."""
    task = splits("pawsx")
    shorter = Pairs(task.test.ids[:5], task.test.first[:5], task.test.second[:5], 1 - task.test.targets[:5])
    alone = dataclasses.replace(task, test=shorter)
    for build in (embed_baselines, probe_baselines):
        whole, part = build(task), build(alone)
        for row, outcome in part.items():
            for name, items in outcome.items.items():
                assert items == pytest.approx(whole[row].items[name][:5])
