"""Thresholds, probes and splits: exact where they claim to be, and blind to the test labels."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from frankenstein.artifact import new_folder
from frankenstein.errors import FrankensteinError
from frankenstein.evaluation.embed import alignment, choose_thresholds, cosine, from_scores, geometry, threshold_curve
from frankenstein.evaluation.models import Vectors
from frankenstein.evaluation.probe import STRENGTHS, logistic_path, pair_features, predict, probe, ridge_path
from frankenstein.evaluation.splits import Splits, read_splits, sentences
from frankenstein.tasks.registry import TASKS
from frankenstein.text.pairs import write_pairs
from tests.evaluation.toy import ToyEncoder, noise, toy_pairs, toy_splits


def brute_force(scores: np.ndarray, labels: np.ndarray, order: tuple[int, ...]) -> int:
    """Most correct items over every pair of cuts."""
    cuts = np.append(np.unique(scores), np.inf)
    return max(
        int((np.asarray(order)[(scores >= low).astype(int) + (scores >= high)] == labels).sum())
        for low in cuts
        for high in cuts[cuts >= low]
    )


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_the_best_there_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 40)
    scores = np.round(rng.normal(size=40) - labels * 0.7, 1)
    chosen = choose_thresholds(TASKS["xnli"], scores, labels)
    hits = int((chosen.classify(scores) == labels).sum())
    assert hits == max(brute_force(scores, labels, (1, 2, 0)), brute_force(scores, labels, (2, 1, 0)))
    assert chosen.order[-1] == TASKS["xnli"].similar


def test_a_constant_score_gets_the_most_frequent_label() -> None:
    labels = np.array([0, 0, 1])
    chosen = choose_thresholds(TASKS["pawsx"], np.zeros(3), labels)
    assert chosen.classify(np.zeros(3)).tolist() == [0, 0, 0]


def test_two_labels_are_cut_halfway_between_their_scores() -> None:
    chosen = choose_thresholds(TASKS["pawsx"], np.array([0.1, 0.2, 0.6, 0.9]), np.array([0, 0, 1, 1]))
    assert chosen.cuts == (pytest.approx(0.4),)


def test_the_threshold_curve_peaks_at_the_chosen_cut() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 200)
    scores = rng.normal(size=200) - labels
    cut, curve = threshold_curve(TASKS["xnli"], scores, labels)
    assert curve[curve[:, 0] == cut][0, 1] == curve[:, 1].max()
    chosen = choose_thresholds(TASKS["xnli"], scores, labels)
    assert curve[:, 1].max() == pytest.approx((chosen.classify(scores) == labels).mean())


def with_other_test_labels(splits: Splits) -> Splits:
    other = dataclasses.replace(splits.test, targets=splits.test.targets[::-1].copy())
    return dataclasses.replace(splits, test=other)


@pytest.mark.parametrize("task", ["xnli", "pawsx", "stsb"])
def test_changed_test_labels_change_no_threshold_and_no_prediction(task: str) -> None:
    splits = toy_splits(task)
    for other in (splits, with_other_test_labels(splits)):
        vectors = Vectors("toy", sentences(splits.fit, splits.dev, splits.test), noise)
        cosines = [cosine(vectors(p.first), vectors(p.second)) for p in (other.dev, other.test)]
        outcomes = from_scores(other.task, cosines[0], other.dev.targets, cosines[1]), probe(other, vectors, 0)
        if other is splits:
            kept = outcomes
    for before, after in zip(kept, outcomes, strict=True):
        assert before.settings == after.settings
        assert all((before.items[name] == after.items[name]).all() for name in before.items)


def test_the_probe_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3] + rng.normal(size=(300, 3)), axis=1)
    for strength, weights in zip(STRENGTHS, logistic_path(x, labels, 3), strict=True):
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(x.astype(float), labels)
        assert np.abs(predict(x, weights) - model.predict_proba(x)).max() < 2e-3


def test_the_graded_probe_equals_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    x -= x.mean(axis=0)
    scores = x @ rng.normal(size=5) + rng.normal(size=200) + 2
    for strength, weights in zip(STRENGTHS, ridge_path(x, scores), strict=True):
        expected = Ridge(alpha=1 / strength).fit(x, scores).predict(x)
        assert predict(x, weights)[:, 0] == pytest.approx(expected, abs=1e-9)


def test_pair_features_stand_in_the_documented_order() -> None:
    u, v = np.array([[1.0, 2.0]]), np.array([[3.0, 1.0]])
    assert pair_features(u, v, graded=False).tolist() == [[1, 2, 3, 1, 2, 1, 3, 2]]
    assert pair_features(u, v, graded=True).tolist() == [[2, 1, 3, 2]]


def test_the_probe_says_what_it_was_trained_on() -> None:
    for fit_on_dev, expected in ((True, "dev"), (False, "train")):
        splits = toy_splits("pawsx", fit_on_dev=fit_on_dev)
        vectors = Vectors("toy", sentences(splits.fit, splits.dev, splits.test), ToyEncoder(splits))
        settings = probe(splits, vectors, 0).settings
        assert settings["trained_on"] == expected
        assert ("cross-validation" in settings["C_chosen_by"]) == fit_on_dev


def test_vectors_that_are_not_finite_are_an_error_that_names_the_model() -> None:
    with pytest.raises(FrankensteinError, match=r"'full': 1 of 2 sentence vectors are not finite"):
        Vectors("full", ["a", "b"], lambda texts: np.array([[0.0, np.nan], [1.0, 2.0]], dtype=np.float32))


def test_the_cosine_of_a_zero_vector_is_zero() -> None:
    assert cosine(np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [3.0, 0.0]])).tolist() == [0.0, 1.0]


def test_geometry_tells_one_direction_from_all_directions() -> None:
    alike = geometry(np.ones((20, 3)))
    assert (alike["anisotropy"], alike["uniformity"]) == (pytest.approx(1.0), pytest.approx(0.0))
    spread = geometry(np.random.default_rng(0).normal(size=(400, 64)))
    assert abs(spread["anisotropy"]) < 0.02
    assert spread["uniformity"] == pytest.approx(-4, abs=0.15)
    assert geometry(np.vstack([np.zeros(3), np.eye(3)]))["zero_vectors"] == 1


def test_alignment_is_the_mean_squared_distance_of_similar_pairs() -> None:
    assert alignment(np.array([1.0, 0.5, 0.0]), np.array([True, True, False])) == pytest.approx(0.5)
    assert alignment(np.array([1.0]), np.array([False])) is None


def cache_with(tmp_path: Path, *splits: str) -> Path:
    with new_folder(tmp_path / "cache", "corpus_cache", {}) as folder:
        for split in splits:
            write_pairs(folder, "pawsx", split, toy_pairs("pawsx", split, 40, 0))
    return tmp_path / "cache"


def test_without_train_the_probe_is_fitted_on_dev(tmp_path: Path) -> None:
    found = read_splits(cache_with(tmp_path, "dev", "test"), "pawsx")
    assert found.fit_is_dev
    assert found.trained_on == "dev"


def test_without_dev_a_tenth_of_train_is_held_out(tmp_path: Path) -> None:
    found = read_splits(cache_with(tmp_path, "train", "test"), "pawsx")
    assert (len(found.fit), len(found.dev)) == (36, 4)
    assert not set(found.fit.ids) & set(found.dev.ids)


def test_a_task_without_test_pairs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FrankensteinError, match="'pawsx' has no test split"):
        read_splits(cache_with(tmp_path, "train", "dev"), "pawsx")


def test_the_cap_takes_a_seeded_choice_of_training_pairs_and_leaves_dev_and_test(tmp_path: Path) -> None:
    whole = read_splits(cache_with(tmp_path, "train", "dev", "test"), "pawsx")
    one, two = whole.capped(10, seed=0), whole.capped(10, seed=1)
    assert len(one.fit) == 10
    assert one.fit.ids != two.fit.ids
    assert one.fit.ids == sorted(one.fit.ids, key=whole.fit.ids.index)
    assert (one.dev, one.test) == (whole.dev, whole.test)
