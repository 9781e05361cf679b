"""The pairs of a task: what may be fitted on, what thresholds may be chosen on, and what is only scored."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from frankenstein.errors import FrankensteinError
from frankenstein.tasks.registry import TASKS, Task
from frankenstein.text.pairs import Pairs, read_pairs

# Without a dev split, every tenth training pair is held out to choose thresholds and strengths on.
_HELD_OUT = 10


@dataclass(frozen=True)
class Splits:
    """One task's pairs.

    Attributes:
        fit: training pairs, or the dev pairs where the task has no training split.
        dev: pairs that thresholds and strengths are chosen on; the same object as `fit` where there is no train.
        test: pairs that are scored and never fitted on.
        trained_on, chosen_on: which split `fit` and `dev` are, in words.
    """

    name: str
    task: type[Task]
    fit: Pairs
    dev: Pairs
    test: Pairs
    trained_on: str
    chosen_on: str

    @property
    def fit_is_dev(self) -> bool:
        """Whether strengths must be chosen by cross-validation, for want of a training split."""
        return self.fit is self.dev

    def capped(self, pairs: int, seed: int) -> "Splits":
        """The same with at most `pairs` training pairs, a seeded choice in their old order; dev is never cut."""
        if self.fit_is_dev or len(self.fit) <= pairs:
            return self
        chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(self.fit))[:pairs]
        return replace(self, fit=take(self.fit, np.sort(chosen)))


def read_splits(cache: Path, name: str) -> Splits:
    """The splits of a task in a corpus cache.

    Raises:
        FrankensteinError: without a test split, or without both dev and train.
    """
    train, dev, test = (read_pairs(cache, name, split) for split in ("train", "dev", "test"))
    if test is None:
        raise FrankensteinError(
            f"{cache}: task {name!r} has no test split; evaluate.tasks can only list tasks that have one"
        )
    if dev is not None:
        trained_on = "dev" if train is None else "train"
        return Splits(name, TASKS[name], dev if train is None else train, dev, test, trained_on, "dev")
    if train is None:
        raise FrankensteinError(f"{cache}: task {name!r} has neither dev nor train; thresholds need one of them")
    held_out = np.arange(len(train)) % _HELD_OUT == 0
    fit, dev = take(train, np.flatnonzero(~held_out)), take(train, np.flatnonzero(held_out))
    return Splits(name, TASKS[name], fit, dev, test, "train (9 of 10)", "train (every 10th)")


def take(pairs: Pairs, indices: np.ndarray) -> Pairs:
    """The pairs at these positions."""
    pick = indices.tolist()
    ids, first, second = ([column[i] for i in pick] for column in (pairs.ids, pairs.first, pairs.second))
    return Pairs(ids, first, second, pairs.targets[indices])


def sentences(*sets: Pairs) -> list[str]:
    """Distinct sentences of the sets, in order of first use."""
    return list(dict.fromkeys(s for pairs in sets for column in (pairs.first, pairs.second) for s in column))
