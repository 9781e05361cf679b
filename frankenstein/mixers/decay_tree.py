"""Causal scores of linear attention with a decay per key channel, and their gradient, without division.

    A_ts = sum_k q_tk k_sk a_(s+1)k .. a_tk        s < t, 0 <= a <= 1

Splitting the product into cumulated decays up to t and from s would divide by numbers that underflow. Instead the C
tokens of a chunk pair up along a binary tree: at level l, blocks of m = 2^l tokens lie side by side; queries of the
right one are decayed from its start ("prefix"), keys of the left one to its end ("suffix"), so that their product is
exact and no factor exceeds 1. One level up, half of the tokens take one more factor, the total decay of the neighbour.
At the top stands what the state between chunks needs. Read from right to left, queries and keys change places: keys
are decayed from the start, queries to the end, and left queries see right keys.

Secondary chunks that keep products of decays exact: Yang et al. 2024, section 4.3, https://arxiv.org/abs/2312.06635;
there one level of them, with all pairs of the innermost computed channel by channel.
Shapes: prefix, suffix, decays (M, C, K) with C a power of two; scores (M, C, C).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LEAF = 16  # tokens; pairs of smaller blocks are computed together and masked: smaller matrix products are slow


def decay_totals(decay: Tensor) -> list[Tensor]:
    """Products of the decays over the blocks of every level: (M, C, K), (M, C/2, K) .. (M, 1, K)."""
    totals = [decay]
    while totals[-1].shape[1] > 1:
        totals.append(totals[-1][:, 0::2] * totals[-1][:, 1::2])
    return totals


def tree_scores(prefix: Tensor, suffix: Tensor, totals: Sequence[Tensor], scores: Tensor, *, reverse: bool) -> None:
    """Fills the scores below the diagonal (above it with `reverse`); `prefix` and `suffix` climb to the top, in place.

    `prefix` are at first the queries times their own decay and `suffix` the keys; the other way round with `reverse`.
    """
    leaf, width = min(LEAF, prefix.shape[1]), prefix.shape[-1]
    query, key = (suffix, prefix) if reverse else (prefix, suffix)
    leaves = _blocks(scores, leaf)
    near = scores.new_zeros(leaves.shape).flatten(0, 1)
    for level, m in _climb(prefix, suffix, totals):
        if m < leaf:
            mask = _paired(leaf, level, scores)
            products = query.view(-1, leaf, width) @ key.view(-1, leaf, width).mT
            near.addcmul_(products, mask.triu() if reverse else mask.tril())
        else:
            (left, _), (_, right) = _halves(suffix, m), _halves(prefix, m)
            quadrants = _quadrants(scores, m, reverse)
            quadrants.copy_((left @ right.mT if reverse else right @ left.mT).view(quadrants.shape))
    leaves.add_(near.view(leaves.shape))


def tree_climb(prefix: Tensor, suffix: Tensor, totals: Sequence[Tensor]) -> list[Tensor]:
    """The climb alone, in place. Returns what every level pairs: (pairs, 2, m, K), left suffixes and right prefixes."""
    return [torch.stack((_halves(suffix, m)[0], _halves(prefix, m)[1]), 1) for _, m in _climb(prefix, suffix, totals)]


def tree_descend(
    d_prefix: Tensor,
    d_suffix: Tensor,
    paired: Sequence[Tensor],
    totals: Sequence[Tensor],
    d_scores: Tensor,
    *,
    reverse: bool,
) -> None:
    """From gradients at the top to those at the bottom, in place; those of the scores join on the way."""
    leaf, width = min(LEAF, d_prefix.shape[1]), d_prefix.shape[-1]
    near = _blocks(d_scores, leaf).flatten(0, 1)
    near = near.triu(1) if reverse else near.tril(-1)
    near = near + near.mT
    for level in range(len(paired) - 1, -1, -1):
        m, pair = 1 << level, paired[level]
        if m < leaf:  # a symmetric product gives both sides: row t of the pairs takes the scores of t with its partners
            both = (near * _paired(leaf, level, near)) @ pair.view(-1, leaf, width)
            d_left, d_right = both.view_as(pair).unbind(1)
        else:
            left, right = pair.unbind(1)
            block = _quadrants(d_scores, m, reverse).reshape(-1, m, m)
            block = block.mT if reverse else block
            d_left, d_right = block.mT @ right, block @ left
        fade_left, fade_right = _halves(totals[level], 1)
        for gradient, below, fade in (
            (_halves(d_prefix, m)[1], d_right, fade_left),
            (_halves(d_suffix, m)[0], d_left, fade_right),
        ):
            torch.addcmul(below, gradient, fade, out=gradient)


def _climb(prefix: Tensor, suffix: Tensor, totals: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yields (l, m) of every level while prefixes and suffixes of its blocks stand there."""
    for level, total in enumerate(totals[:-1]):
        m = 1 << level
        yield level, m
        left, right = _halves(total, 1)
        _halves(prefix, m)[1].mul_(left)
        _halves(suffix, m)[0].mul_(right)


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(M, C, K) to the left and the right blocks of all pairs of blocks of m tokens, (pairs, m, K) each."""
    left, right = x.view(-1, 2, m, x.shape[-1]).unbind(1)
    return left, right


def _blocks(scores: Tensor, m: int) -> Tensor:
    """(M, C, C) to the blocks on its diagonal, (M, C/m, m, m)."""
    rows, size, _ = scores.shape
    return scores.as_strided((rows, size // m, m, m), (size * size, m * (size + 1), size, 1), scores.storage_offset())


def _quadrants(scores: Tensor, m: int, reverse: bool) -> Tensor:
    """(M, C/2m, m, m): right tokens with left ones; with `reverse`, left tokens with right ones."""
    pairs = _blocks(scores, 2 * m)
    return pairs[..., :m, m:] if reverse else pairs[..., m:, :m]


def _paired(size: int, level: int, like: Tensor) -> Tensor:
    """(size, size): 1 where the level pairs i and j, that is where `level` is their highest differing bit."""
    i = torch.arange(size, device=like.device)
    return ((i[:, None] ^ i) >> level == 1).to(like.dtype)
