"""Pooling against values worked by hand."""

import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.sentence.pooling import sentence_vectors

# Two sentences of width 2; the second has one real token. The 9s are padding and must never be seen.
HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [5.0, -1.0]], [[2.0, -6.0], [9.0, 9.0], [9.0, 9.0]]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[3.0, -1.0], [2.0, -6.0]]),
        ("cls", [[1.0, -4.0], [2.0, -6.0]]),
        ("max", [[5.0, 2.0], [2.0, -6.0]]),
    ],
)
def test_each_pooling_gives_the_value_worked_by_hand(pooling: str, expected: list[list[float]]) -> None:
    torch.testing.assert_close(sentence_vectors(HIDDEN, MASK, pooling, False), torch.tensor(expected))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_what_stands_at_padding_changes_nothing(pooling: str) -> None:
    other = HIDDEN.clone()
    other[~MASK] = float("inf")
    assert torch.equal(sentence_vectors(other, MASK, pooling, True), sentence_vectors(HIDDEN, MASK, pooling, True))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_row_without_real_tokens_gives_zeros(pooling: str) -> None:
    vectors = sentence_vectors(HIDDEN, torch.zeros_like(MASK), pooling, True)
    assert torch.equal(vectors, torch.zeros(2, 2))


def test_cls_is_the_first_real_token_also_under_left_padding() -> None:
    mask = torch.tensor([[False, True, True]])
    assert sentence_vectors(HIDDEN[:1], mask, "cls", False).tolist() == [[3.0, 2.0]]


def test_normalized_vectors_have_unit_length_in_float32_even_from_bfloat16() -> None:
    vectors = sentence_vectors(HIDDEN.bfloat16(), MASK, "mean", True)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))


def test_an_unknown_pooling_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(FrankensteinError, match="unknown pooling 'men'; known: cls, max, mean; did you mean 'mean'"):
        sentence_vectors(HIDDEN, MASK, "men", True)
