import numpy as np
import pytest

from frankenstein.text.order import batch_indices


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 4)])
def test_every_row_occurs_once_an_epoch_across_batches(num_rows, batch_size):
    epochs = 24
    steps = num_rows * epochs // batch_size
    sequence = np.concatenate([batch_indices(num_rows, batch_size, seed=0, step=s) for s in range(steps)])
    for epoch in sequence[: len(sequence) // num_rows * num_rows].reshape(-1, num_rows):
        assert sorted(epoch) == list(range(num_rows))


def test_a_batch_depends_on_its_step_only_and_not_on_earlier_calls():
    late = batch_indices(100, 8, seed=5, step=40)
    for step in range(60):
        batch_indices(100, 8, seed=5, step=step)
    assert (batch_indices(100, 8, seed=5, step=40) == late).all()
    assert late.shape == (8,)
    assert late.dtype == np.int64


def test_epochs_and_seeds_have_different_orders():
    orders = [batch_indices(50, 50, seed=s, step=e).tolist() for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(map(tuple, orders))) == 4


def test_two_micro_batches_are_one_large_batch():
    halves = [batch_indices(33, 4, seed=1, step=s) for s in (6, 7)]
    assert (np.concatenate(halves) == batch_indices(33, 8, seed=1, step=3)).all()
