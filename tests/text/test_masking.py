import time

import numpy as np
import pytest

from frankenstein.text.masking import MaskingRule, mask_rows

SPECIAL = (0, 1, 2, 3, 4)
VOCAB = 1000
ROWS = np.random.default_rng(0).integers(5, VOCAB, (128, 512))
ROWS[:, 0] = 2
ROWS[:, 100::90] = 3
ROWS[-3:, 300:] = 0


def rule(probability=0.2, **changes):
    return MaskingRule(
        **{"mask_id": 4, "special_ids": SPECIAL, "vocab_size": VOCAB, "probability": probability, **changes}
    )


def test_eighty_ten_ten_of_the_wanted_share():
    inputs, chosen = mask_rows(ROWS, rule(), seed=0, step=0)
    ordinary = ~np.isin(ROWS, SPECIAL)
    n = chosen.sum()
    assert n / ordinary.sum() == pytest.approx(0.2, abs=0.005)
    masked, kept = (inputs[chosen] == 4).sum(), (inputs[chosen] == ROWS[chosen]).sum()
    assert masked / n == pytest.approx(0.8, abs=0.01)
    assert kept / n == pytest.approx(0.1, abs=0.01)
    assert (n - masked - kept) / n == pytest.approx(0.1, abs=0.01)


def test_special_tokens_are_never_chosen_nor_put_in_and_the_rest_stays():
    inputs, chosen = mask_rows(ROWS, rule(0.9), seed=1, step=2)
    assert not np.isin(ROWS[chosen], SPECIAL).any()
    assert (inputs[~chosen] == ROWS[~chosen]).all()
    assert set(np.unique(inputs[chosen])) & set(SPECIAL) == {4}
    assert inputs.dtype == np.int64
    assert chosen.dtype == bool


def test_random_tokens_come_from_the_whole_ordinary_vocabulary():
    inputs, chosen = mask_rows(ROWS, rule(1.0), seed=0, step=0)
    swapped = inputs[chosen & (inputs != 4) & (inputs != ROWS)]
    assert swapped.min() == 5
    assert swapped.max() == VOCAB - 1
    assert np.bincount(swapped, minlength=VOCAB)[5:].std() < 5  # Poisson: sqrt(6.4)


def test_masks_are_a_pure_function_of_seed_and_step():
    first = mask_rows(ROWS, rule(), seed=3, step=7)
    np.random.default_rng().random(5)
    again = mask_rows(ROWS.copy(), rule(), seed=3, step=7)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in ({"seed": 4, "step": 7}, {"seed": 3, "step": 8}, {"seed": 7, "step": 3}):
        assert (mask_rows(ROWS, rule(), **other)[1] != first[1]).any()


def test_every_row_with_ordinary_tokens_has_a_chosen_one():
    rows = np.array([[2, 9, 3, 0], [2, 3, 0, 0], [2, 8, 9, 3]])
    for step in range(50):
        _, chosen = mask_rows(rows, rule(0.0), seed=0, step=step)
        assert chosen.sum(axis=1).tolist() == [1, 0, 1]


def test_the_arguments_are_not_changed_and_no_rows_are_allowed():
    before = ROWS.copy()
    mask_rows(ROWS, rule(), seed=0, step=0)
    assert (before == ROWS).all()
    inputs, chosen = mask_rows(ROWS[:0], rule(), seed=0, step=0)
    assert inputs.shape == chosen.shape == (0, 512)


def words_of(rows, starts):
    """Word number of every token by a plain loop; -1 for special tokens."""
    words = np.full(rows.shape, -1)
    number = -1
    for i, row in enumerate(rows):
        inside = False
        for j, token in enumerate(row):
            if token in SPECIAL:
                inside = False
            else:
                number += starts[token] or not inside
                words[i, j] = number
                inside = True
    return words


def test_whole_words_are_chosen_together_at_the_wanted_rate():
    starts = np.zeros(VOCAB, bool)
    starts[5:400] = True
    _, chosen = mask_rows(ROWS, rule(word_starts=starts), seed=0, step=0)
    words = words_of(ROWS, starts)
    assert not chosen[words < 0].any()
    size = np.bincount(words[words >= 0])
    taken = np.bincount(words[chosen], minlength=len(size))
    assert set(np.unique(taken / size)) == {0.0, 1.0}
    assert (taken > 0).mean() == pytest.approx(0.2, abs=0.01)


def test_one_whole_word_is_chosen_where_chance_gives_none():
    starts = np.zeros(VOCAB, bool)
    starts[5:10] = True
    rows = np.array([[2, 5, 50, 51, 6, 52, 3]])
    for step in range(20):
        _, chosen = mask_rows(rows, rule(0.0, word_starts=starts), seed=0, step=step)
        assert chosen[0].astype(int).tolist() in ([0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("whole_words", [False, True])
def test_masking_a_batch_takes_milliseconds(whole_words):
    starts = np.arange(VOCAB) % 2 == 0 if whole_words else None
    times = []
    for step in range(20):
        start = time.perf_counter()
        mask_rows(ROWS, rule(word_starts=starts), seed=0, step=step)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.010
