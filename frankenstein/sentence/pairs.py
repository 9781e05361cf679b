"""Training and development pairs: read from the cache, tokenized once, served in a fixed order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from frankenstein.artifact import MANIFEST, open_folder, sha256
from frankenstein.errors import FrankensteinError
from frankenstein.sentence.tokens import SentenceRows, pad_rows
from frankenstein.tasks.registry import TASKS
from frankenstein.text.pairs import Pairs, read_pairs
from frankenstein.text.tokenizer import Tokenizer

# Batches that are cut from one length-sorted stretch of the shuffled pairs; more would pad less and shuffle less.
_WINDOW = 8


class PairBatch(NamedTuple):
    """n pairs as one batch of 2n rows, the first sentences above the second ones.

    ids, mask: (2n, T); targets: (n,), the wanted cosines.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor


class PairSet:
    """Tokenized pairs with the cosine that is wanted of each.

    Args:
        pairs: sentences; their `targets` are cosines in [-1, 1] already.
    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer, max_length: int) -> None:
        self.pairs = pairs
        self.first = SentenceRows(pairs.first, tokenizer, max_length)
        self.second = SentenceRows(pairs.second, tokenizer, max_length)
        self.targets = np.asarray(pairs.targets, dtype=np.float32)
        self.lengths = np.maximum(self.first.lengths, self.second.lengths)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, chosen: np.ndarray) -> PairBatch:
        """The chosen pairs, padded to the longest of their sentences, on the CPU."""
        rows = [self.first.row(i) for i in chosen] + [self.second.row(i) for i in chosen]
        ids, mask = pad_rows(rows, self.first.pad_id)
        return PairBatch(ids, mask, torch.from_numpy(self.targets[chosen]))

    def describe(self, index: int) -> dict[str, Any]:
        """One pair as it was given: id, both sentences and the wanted cosine."""
        pairs = self.pairs
        sentences = {"id": pairs.ids[index], "first": pairs.first[index], "second": pairs.second[index]}
        return {**sentences, "target": float(self.targets[index])}

    def in_order(self, batch_size: int) -> Iterator[np.ndarray]:
        """Index batches that visit every pair once, pairs of like length together."""
        order = np.argsort(self.lengths, kind="stable")
        yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


class PairOrder:
    """Which pairs make up a step: every pair once an epoch, pairs of one task and of like length together.

    A pure function of (seed, step): the shuffled pairs of a task are cut into stretches of some batches, each stretch
    is sorted by length and cut into batches, and the batches of all tasks are shuffled. The last batch of a task may
    be smaller.
    Source: the proportional sampler over several datasets of sentence-transformers,
    https://sbert.net/docs/package_reference/sentence_transformer/sampler.html
    Args:
        lengths: tokens of each pair.
        sizes: pairs of each task, in the order of `lengths`.
    """

    def __init__(self, lengths: np.ndarray, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.sizes, self.batch_size, self.seed = lengths, tuple(sizes), batch_size, seed
        self.steps_per_epoch = sum(-(-size // batch_size) for size in sizes)
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])

    def indices(self, step: int) -> np.ndarray:
        """Pair indices of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, list(self._epoch(epoch)))
        return self._cached[1][position]

    def _epoch(self, epoch: int) -> Iterator[np.ndarray]:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        stretch = _WINDOW * self.batch_size
        batches: list[np.ndarray] = []
        first = 0
        for size in self.sizes:
            shuffled = first + generator.permutation(size)
            first += size
            for start in range(0, size, stretch):
                window = shuffled[start : start + stretch]
                window = window[np.argsort(self.lengths[window], kind="stable")]
                batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        yield from (batches[i] for i in generator.permutation(len(batches)))


@dataclass(frozen=True)
class PairData:
    """What is trained on: pairs with wanted cosines, development pairs by task, and a digest of their source.

    `sizes` are the training pairs of each task, which stand one task after the other.
    """

    train: Pairs
    sizes: tuple[int, ...]
    dev: Mapping[str, Pairs]
    digest: str


def task_data(cache: Path, tasks: Sequence[str], dev_pairs: int) -> PairData:
    """The training pairs of several tasks in one list, and the first `dev_pairs` development pairs of each.

    Raises:  FrankensteinError: when a task has no training pairs, naming task, folder and the tasks that have some.
    """
    splits = open_folder(cache, "corpus_cache")["tasks"]
    train = [_training_pairs(cache, task, splits) for task in tasks]
    dev = {task: _read(cache, task, "dev") for task in tasks}
    return PairData(
        _join(train),
        tuple(len(pairs) for pairs in train),
        {task: _first(pairs, dev_pairs) for task, pairs in dev.items() if pairs is not None},
        sha256(cache / MANIFEST),
    )


def _training_pairs(cache: Path, task: str, splits: Mapping[str, Mapping[str, int]]) -> Pairs:
    pairs = _read(cache, task, "train")
    if pairs is None or not len(pairs):
        trained = ", ".join(sorted(name for name, rows in splits.items() if rows.get("train"))) or "none"
        raise FrankensteinError(
            f"sbert.tasks: {task!r} has no training pairs in {cache / 'tasks' / task}; tasks that have some: {trained}"
        )
    return pairs


def _read(cache: Path, task: str, split: str) -> Pairs | None:
    """A cached split with the cosines that are wanted of its labels or scores."""
    pairs = read_pairs(cache, task, split)
    if pairs is None:
        return None
    wanted = [TASKS[task].cosine_target(float(value)) for value in pairs.targets]
    return Pairs(pairs.ids, pairs.first, pairs.second, np.array(wanted, dtype=np.float32))


def _first(pairs: Pairs, count: int) -> Pairs:
    return Pairs(pairs.ids[:count], pairs.first[:count], pairs.second[:count], pairs.targets[:count])


def _join(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(
        [i for part in parts for i in part.ids],
        [text for part in parts for text in part.first],
        [text for part in parts for text in part.second],
        np.concatenate([part.targets for part in parts]),
    )
