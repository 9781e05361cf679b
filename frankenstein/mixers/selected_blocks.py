"""Softmax attention of every query over its own choice of key blocks: the selected branch of `nsa.py`.

    o_t = sum_(j in blocks of t) softmax_j(scale q_t . k_j) v_j

The work is turned round: for each key block, the queries that chose it are gathered into tiles of rows, so that all
products are dense and keys are never copied per query. Tiles give partial softmax sums, which are merged by their
maxima; the backward pass computes the weights again. Time and memory grow with the chosen pairs, not with T^2.
Shapes: q (B, T, H, R, K) with R query heads for each of H key heads; k (B, T, H, K); v (B, T, H, V).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frankenstein.mixers.base import at_once
from frankenstein.mixers.delta_chunks import in_full_precision

ROWS = 128  # queries of a tile, all with the same block
LOGITS = 1 << 18  # logits that are computed at once
PARTIAL = 1 << 20  # numbers in the partial outputs of the heads that are computed at once


class Tiles(NamedTuple):
    """Tiles of the heads n0 .. n1, of all B H: their block (n,) and query rows (n, ROWS), both counted from head n0.

    A head has T + 1 rows; the last stands for no query and fills the tiles.
    """

    n0: int
    n1: int
    block: Tensor
    rows: Tensor


class SelectedBlocks(torch.autograd.Function):
    """`apply(q, k, v, chosen, real, block_size, causal, scale)`: (B, T, H, R, V).

    chosen (B, T, H, blocks) bool: the blocks of every query; gets no gradient. real (B, T) bool, True for keys that may
    be attended, or None for all. A query that sees no key gets 0.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes the inputs one by one
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        real: Tensor | None,
        block_size: int,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Softmax sums per tile, then merged per query."""
        queries, keys, values = _operands(q, k, v, real, block_size, scale)
        repeats, width = q.shape[3], v.shape[-1]
        o, lse = q.new_empty(*queries.shape[:-1], width), q.new_empty(queries.shape[:-1])
        ctx.groups = list(_groups(chosen, repeats * width))
        for tiles in ctx.groups:
            group, rows = slice(tiles.n0, tiles.n1), tiles.rows.flatten()
            top, sums = q.new_empty(len(rows), repeats), q.new_empty(len(rows), repeats, width + 1)
            for part, place in _parts(tiles, repeats * block_size):
                logits = _take(queries[group], part.rows) @ _take(keys[group], part.block).mT
                if causal:
                    _hide_later(logits, part, queries, keys)
                best = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(q.dtype).min)
                top[place] = best.view(-1, repeats)
                weights = logits.sub_(best).exp_()
                sums[place] = (weights @ _take(values[group], part.block)).view(-1, repeats, width + 1)
            o[group], lse[group] = _merge(rows, top, sums, queries[group].shape[:2])
        o = o[:, :-1]
        ctx.save_for_backward(q, k, v, real, o, lse)
        ctx.block_size, ctx.causal, ctx.scale = block_size, causal, scale
        return _heads_last(o, q.shape)

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, real, o, lse = ctx.saved_tensors
        queries, keys, values = _operands(q, k, v, real, ctx.block_size, ctx.scale)
        queries[..., -1] = -lse
        d_o = q.new_zeros(*queries.shape[:-1], v.shape[-1] + 1)
        d_o[:, :-1, :, :-1] = _heads_first(grad)
        d_o[:, :-1, :, -1] = -(d_o[:, :-1, :, :-1] * o).sum(-1)  # d_o [v, 1]^T: the gradient before the softmax's sum
        d_queries, d_keys, d_values = (torch.zeros_like(x) for x in (queries, keys, values))
        for tiles in ctx.groups:
            group = slice(tiles.n0, tiles.n1)
            for part, _ in _parts(tiles, q.shape[3] * ctx.block_size):
                query, key = _take(queries[group], part.rows), _take(keys[group], part.block)
                d_out, value = _take(d_o[group], part.rows), _take(values[group], part.block)
                weights = query @ key.mT
                if ctx.causal:
                    _hide_later(weights, part, queries, keys)
                weights.exp_()
                _add(d_values[group], part.block, weights.mT @ d_out)
                d_logits = (d_out @ value.mT).mul_(weights)
                _add(d_keys[group], part.block, d_logits.mT @ query)
                _add(d_queries[group], part.rows, d_logits @ key)  # padded keys spoil channel -2, which is dropped
        d_q = _heads_last(d_queries[:, :-1, :, :-2].mul(ctx.scale), q.shape)
        d_k, d_v = (_tokens(x[..., :-n], k.shape) for x, n in ((d_keys, 2), (d_values, 1)))
        return d_q, d_k, d_v, None, None, None, None, None


def _operands(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(B H, T + 1, R, K + 2), (B H, blocks, block, K + 2), (B H, blocks, block, V + 1).

    The last channels: 1 and -lse of queries (0 at first), 0 or -inf for padded tokens and 1 of keys, 1 of values.
    """
    batch, length, heads, repeats, width = q.shape
    blocks = -(-length // block_size)
    queries = q.new_empty(batch * heads, length + 1, repeats, width + 2)
    torch.mul(_heads_first(q), scale, out=queries[:, :-1, :, :-2])
    queries[:, -1], queries[..., -2], queries[..., -1] = 0.0, 1.0, 0.0
    keys = k.new_zeros(batch * heads, blocks * block_size, width + 2)
    keys[:, :length, :-2] = k.transpose(1, 2).flatten(0, 1)
    keys[:, length:, -2], keys[..., -1] = -math.inf, 1.0
    if real is not None:
        keys[:, :length, -2].masked_fill_(~real.repeat_interleave(heads, 0), -math.inf)
    values = v.new_zeros(batch * heads, blocks * block_size, v.shape[-1] + 1)
    values[:, :length, :-1] = v.transpose(1, 2).flatten(0, 1)
    values[..., -1] = 1.0
    return queries, keys.unflatten(1, (blocks, block_size)), values.unflatten(1, (blocks, block_size))


def _heads_first(x: Tensor) -> Tensor:
    """(B, T, H, R, K) to (B H, T, R, K)."""
    return x.transpose(1, 2).flatten(0, 1)


def _heads_last(x: Tensor, shape: torch.Size) -> Tensor:
    """(B H, T, R, V) to (B, T, H, R, V)."""
    return x.unflatten(0, (shape[0], shape[2])).transpose(1, 2)


def _tokens(x: Tensor, shape: torch.Size) -> Tensor:
    """(B H, blocks, block, K) to (B, T, H, K)."""
    return x.flatten(1, 2)[:, : shape[1]].unflatten(0, (shape[0], shape[2])).transpose(1, 2)


def _groups(chosen: Tensor, width: int) -> Iterator[Tiles]:
    """Heads in groups whose partial sums have about PARTIAL numbers, `width` for each pair of query and block."""
    batch, length, heads, blocks = chosen.shape
    members = chosen.permute(0, 2, 3, 1).reshape(batch * heads, blocks, length)
    pairs = int(members.sum()) // len(members) + 1
    group = max(1, at_once(chosen, PARTIAL) // (pairs * width))
    for n0 in range(0, len(members), group):
        inside = members[n0 : n0 + group]
        counts = inside.sum(2).flatten()
        tiles = (counts + ROWS - 1) // ROWS
        block = torch.repeat_interleave(torch.arange(len(tiles), device=tiles.device), tiles)
        # Pairs come sorted by block; a block's first pair is the first of its first tile.
        pair = inside.flatten().nonzero().squeeze(1)
        segment = pair // length
        shift = (tiles.cumsum(0) - tiles) * ROWS - (counts.cumsum(0) - counts)
        rows = torch.full((len(block) * ROWS,), length, device=pair.device)
        place = torch.arange(len(pair), device=pair.device) + shift[segment]
        rows[place] = segment // blocks * (length + 1) + pair % length
        yield Tiles(n0, min(n0 + group, len(members)), block, rows.view(-1, ROWS))


def _parts(tiles: Tiles, columns: int) -> Iterator[tuple[Tiles, slice]]:
    """Some tiles at a time, with at most LOGITS logits, and the places of their rows among all."""
    size = max(1, at_once(tiles.rows, LOGITS) // (ROWS * columns))
    for a in range(0, len(tiles.block), size):
        some = slice(a, a + size)
        part = tiles._replace(block=tiles.block[some], rows=tiles.rows[some])
        yield part, slice(a * ROWS, a * ROWS + part.rows.numel())


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x (heads, rows, L, K) at places (n,) or (n, ROWS): (n, L, K) or (n, ROWS L, K)."""
    # As rows of a matrix: what index_select and index_add_ are fast on.
    return x.view(-1, x.shape[2] * x.shape[3]).index_select(0, places.flatten()).view(len(places), -1, x.shape[3])


def _add(x: Tensor, places: Tensor, values: Tensor) -> None:
    """Adds values (n, L, K) or (n, ROWS L, K) to the rows of x (heads, rows, L, K) at their places."""
    flat = x.view(-1, x.shape[2] * x.shape[3])
    flat.index_add_(0, places.flatten(), values.view(-1, flat.shape[1]))


def _hide_later(logits: Tensor, part: Tiles, queries: Tensor, keys: Tensor) -> None:
    """Sets the logits (n, ROWS R, block) of keys after their query to -inf."""
    (rows, repeats), (blocks, block_size) = queries.shape[1:3], keys.shape[1:3]
    key = (part.block % blocks * block_size)[:, None] + torch.arange(block_size, device=logits.device)
    later = key[:, None, :] > (part.rows % rows)[:, :, None]
    logits.view(*later.shape[:2], repeats, -1).masked_fill_(later[:, :, None], -math.inf)


def _merge(rows: Tensor, top: Tensor, sums: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Outputs (n, T + 1, R, V) and log sums (n, T + 1, R) of the queries, from the partial ones of their blocks."""
    count, repeats = math.prod(shape), top.shape[1]
    highest = top.new_full((count, repeats), torch.finfo(top.dtype).min)
    highest.scatter_reduce_(0, rows[:, None].expand_as(top), top, "amax")
    sums.mul_((top - highest[rows]).exp_()[..., None])
    merged = sums.new_zeros(count, *sums.shape[1:]).index_add_(0, rows, sums)
    total = merged[..., -1]
    seen = total > 0
    o = merged[..., :-1] / total.masked_fill(~seen, 1.0)[..., None]
    lse = torch.where(seen, highest + total.log(), 0.0)
    return o.view(*shape, repeats, -1), lse.view(*shape, repeats)
