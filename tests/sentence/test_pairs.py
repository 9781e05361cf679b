"""The order of training pairs, and reading them from a cache."""

import numpy as np
import pytest

from frankenstein.errors import FrankensteinError
from frankenstein.sentence.pairs import PairOrder, PairSet, task_data
from frankenstein.text.tokenizer import Tokenizer
from tests.sentence.world import World, toy_pairs

LENGTHS = np.random.default_rng(3).integers(4, 40, 1003)


def test_every_pair_comes_once_an_epoch_and_the_order_changes_with_epoch_and_seed() -> None:
    order = PairOrder(LENGTHS, (len(LENGTHS),), 16, seed=5)
    epochs = [[order.indices(e * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)] for e in range(2)]
    assert order.steps_per_epoch == 63  # ceil(1003 / 16): the batch size is honoured and the rest is not dropped
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == list(range(1003))
        assert sorted(map(len, batches)) == [11] + [16] * 62
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    assert not np.array_equal(PairOrder(LENGTHS, (len(LENGTHS),), 16, seed=6).indices(0), order.indices(0))


def test_a_batch_has_pairs_of_one_task_and_every_pair_comes_once() -> None:
    sizes = (100, 7, len(LENGTHS) - 107)
    order = PairOrder(LENGTHS, sizes, 16, seed=5)
    task_of = np.repeat(np.arange(3), sizes)
    batches = [order.indices(step) for step in range(order.steps_per_epoch)]
    assert all(len(set(task_of[batch])) == 1 for batch in batches)
    assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
    assert len({int(task_of[batch[0]]) for batch in batches[: len(batches) // 2]}) > 1  # tasks are interleaved


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    straight = PairOrder(LENGTHS, (len(LENGTHS),), 16, seed=5)
    backwards = PairOrder(LENGTHS, (len(LENGTHS),), 16, seed=5)
    steps = range(130)
    expected = [straight.indices(step) for step in steps]
    for step in reversed(steps):
        assert np.array_equal(backwards.indices(step), expected[step])


def test_pairs_of_like_length_share_a_batch() -> None:
    order = PairOrder(LENGTHS, (len(LENGTHS),), 16, seed=5)
    padded = sum(LENGTHS[b].max() * len(b) for b in map(order.indices, range(order.steps_per_epoch)))
    shuffled = np.random.default_rng(0).permutation(LENGTHS)
    unsorted = sum(shuffled[i : i + 16].max() * len(shuffled[i : i + 16]) for i in range(0, len(LENGTHS), 16))
    assert padded / LENGTHS.sum() < 1.15 < 1.5 < unsorted / LENGTHS.sum()


def test_a_batch_holds_both_sentences_in_one_padded_array(world: World) -> None:
    words = Tokenizer.load(world.tokenizer)
    pairs = toy_pairs(10, 1)
    batch = PairSet(pairs, words, 32).batch(np.array([7, 2]))
    texts = [pairs.first[7], pairs.first[2], pairs.second[7], pairs.second[2]]
    for row, mask, text in zip(batch.ids.tolist(), batch.mask, texts, strict=True):
        expected = [words.cls_id, *words.encode(text), words.sep_id]
        assert row == expected + [words.pad_id] * (len(row) - len(expected))
        assert mask.sum() == len(expected)
    assert batch.targets.tolist() == [5.0, 0.0]


def test_labels_and_scores_become_the_cosines_of_their_tasks(world: World) -> None:
    data = task_data(world.cache, ("pawsx", "stsb"), dev_pairs=12)
    assert len(data.train) == 32 + 256
    assert set(data.train.targets[:32]) == {0.0, 1.0}
    assert set(data.train.targets[32:]) == {0.0, 1.0}
    assert {task: len(pairs) for task, pairs in data.dev.items()} == {"pawsx": 12, "stsb": 12}


def test_a_task_without_training_pairs_is_named_with_those_that_have_some(world: World) -> None:
    where = world.cache / "tasks" / "inferes"
    message = f"'inferes' has no training pairs in {where}; tasks that have some: pawsx, stsb"
    with pytest.raises(FrankensteinError, match=message):
        task_data(world.cache, ("stsb", "inferes"), dev_pairs=10)
