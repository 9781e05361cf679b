"""The order of training examples as a pure function of (seed, step): resuming needs no loader state."""

from functools import lru_cache

import numpy as np

_PURPOSE = 2  # keeps these draws apart from those of the masking with the same seed


def batch_indices(num_rows: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """(batch_size,) int64 row numbers of one batch; step counts from 0.

    The batches follow each other through one endless sequence: permutation of epoch 0, of epoch 1, ... Place
    p = step * batch_size + k belongs to epoch p // num_rows, so a batch may hold the end of one epoch and the beginning
    of the next, and every row occurs exactly once an epoch.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(places, num_rows)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(num_rows, seed, int(epoch))[offsets[here]]
    return indices


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _PURPOSE]))
    order = rng.permutation(num_rows)
    order.setflags(write=False)
    return order
