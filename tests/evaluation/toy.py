"""Toy tasks whose perfect vectors are known: the cosine of a pair is what its label or score asks for."""

import math

import numpy as np

from frankenstein.evaluation.splits import Splits
from frankenstein.tasks.registry import TASKS
from frankenstein.text.pairs import Pairs


def toy_pairs(task: str, split: str, n: int, seed: int) -> Pairs:
    """Pairs "<task> <split> <i> a|b" with balanced labels, or evenly drawn scores."""
    kind, rng = TASKS[task], np.random.default_rng([seed, *split.encode()])
    if kind.score_range is None:
        targets = rng.permutation(np.arange(n) % len(kind.labels))
    else:
        targets = rng.uniform(*kind.score_range, n)
    first, second = ([f"{task} {split} {i} {side}" for i in range(n)] for side in "ab")
    return Pairs([f"{split}{i}" for i in range(n)], first, second, targets)


def toy_splits(task: str, n: int = 240, seed: int = 0, fit_on_dev: bool = False) -> Splits:
    """A task with train, dev and test, or with dev and test only."""
    fit, dev, test = (toy_pairs(task, split, n, seed) for split in ("train", "dev", "test"))
    trained_on = "dev" if fit_on_dev else "train"
    return Splits(task, TASKS[task], dev if fit_on_dev else fit, dev, test, trained_on, "dev")


class ToyEncoder:
    """Vectors (n, 4) in which the cosine of each pair is exactly the one its target asks for."""

    def __init__(self, *tasks: Splits) -> None:
        self.known: dict[str, list[float]] = {}
        for splits in tasks:
            for pairs in (splits.fit, splits.dev, splits.test):
                for a, b, target in zip(pairs.first, pairs.second, pairs.targets, strict=True):
                    angle = math.acos(splits.task.cosine_target(target))
                    self.known[a] = [1.0, 0.0, 0.1, 0.0]
                    self.known[b] = [math.cos(angle), math.sin(angle), 0.1, 0.0]

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.array([self.known[text] for text in texts], dtype=np.float32)


def noise(texts: list[str]) -> np.ndarray:
    """Vectors that know nothing."""
    return np.random.default_rng(3).normal(size=(len(texts), 8)).astype(np.float32)
