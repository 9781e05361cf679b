"""Softmax attention under a decay of the logits, in tiles: what computes the Forgetting Transformer's mixer (fox.py).

    o_i = sum_j softmax_j(scale q_i . k_j + D_ij) v_j
    D_ij = c_i - c_j for j <= i,    D_ij = e_j - e_i for j > i, in both directions only

Memory is linear in T: a tile of query rows at a time, whose weights the backward pass computes again (Dao et al. 2022,
https://arxiv.org/abs/2205.14135). Beside the diagonal D is an outer sum, so it rides along as three more channels of
the product q k^T, measured from the tile's first row: cumulated decay costs no digits, and the sums that c and e get
as gradient are channels of the products of the backward pass.

Keys whose weight is below the rounding error are left out (Lin et al. 2025, "Adaptive Computation Pruning",
https://arxiv.org/abs/2504.06949). With U = scale max|q| max|k|, every row holds a key of logit >= -U and D = 0, so a
key with D < log(eps / T) - 2 U weighs less than eps / T. Heads that decay fast take linear time.
Shapes: q, k (N, T, K); v (N, T, V); c, e (N, T) float64; N is the batch times the heads.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frankenstein.mixers.base import at_once
from frankenstein.mixers.delta_chunks import in_full_precision

ROWS = 128  # query rows of a tile
LOGITS = 1 << 18  # logits of a tile: 1 MB in float32, what the cache of a core holds


class Decay(NamedTuple):
    """What bounds and bends the logits: c, e (None: one direction), real (N, T) bool or None, window or None."""

    c: Tensor
    e: Tensor | None
    real: Tensor | None
    window: int | None


class Tile(NamedTuple):
    """Heads n0 .. n1, query rows a .. b, keys s .. t."""

    n0: int
    n1: int
    a: int
    b: int
    s: int
    t: int

    @property
    def queries(self) -> tuple[slice, slice]:
        """Index of the tile's rows in (N, T, ...)."""
        return slice(self.n0, self.n1), slice(self.a, self.b)

    @property
    def keys(self) -> tuple[slice, slice]:
        """Index of the tile's keys in (N, T, ...)."""
        return slice(self.n0, self.n1), slice(self.s, self.t)


class DecaySoftmax(torch.autograd.Function):
    """The equation of the module: `apply(q, k, v, c, e, real, scale, window)`.

    e is None for one direction, j <= i. real (N, T) bool is True for the tokens that take part, None for all; the
    others come out as 0. In one direction, `window` leaves the keys i - window + 1 .. i. c and e are float64.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes the inputs one by one
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        c: Tensor,
        e: Tensor | None,
        real: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """(N, T, V)."""
        decay = Decay(c, e, real, window)
        queries, keys, values = _operands(q, k, v, scale)
        o, lse = torch.empty_like(values[..., :-1]), q.new_empty(q.shape[:2])
        ctx.tiles = list(_tiles(queries, keys, decay))
        smallest = _negligible(queries)  # smaller weights would be denormal numbers, which are slow
        for tile in ctx.tiles:
            logits = _logits(tile, queries, keys, decay, None)
            top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(q.dtype).min)
            sums = torch.threshold_(logits.sub_(top), smallest, -math.inf).exp_() @ values[tile.keys]
            total = sums[..., -1:]
            o[tile.queries] = sums[..., :-1] / total
            lse[tile.queries] = (top + total.log()).squeeze(-1)
        if real is not None:
            o.masked_fill_(~real[..., None], 0.0)
            lse.masked_fill_(lse.isneginf(), 0.0)  # rows that see no key, none of them real
        ctx.save_for_backward(q, k, v, c, e, real, o, lse)
        ctx.scale, ctx.window = scale, window
        return o

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, c and e."""
        q, k, v, c, e, real, o, lse = ctx.saved_tensors
        decay = Decay(c, e, real, ctx.window)
        queries, keys, values = _operands(q, k, v, ctx.scale)
        d_o = _widen(grad if real is None else grad.masked_fill(~real[..., None], 0.0), 1)
        d_o[..., -1] = -(d_o[..., :-1] * o).sum(-1)  # so that d_o [v, 1]^T is the gradient before the softmax's sum
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(o)
        d_c, d_e = torch.zeros_like(c), None if e is None else torch.zeros_like(e)
        smallest = _negligible(queries)  # smaller weights would be denormal numbers, which are slow
        for tile in ctx.tiles:
            logits = _logits(tile, queries, keys, decay, lse[tile.queries])
            weights = torch.threshold_(logits, smallest, -math.inf).exp_()
            d_values[tile.keys].baddbmm_(weights.mT, d_o[tile.queries][..., :-1])
            d_logits = (d_o[tile.queries] @ values[tile.keys].mT).mul_(weights)
            d_queries[tile.queries] = d_logits @ keys[tile.keys]  # padded keys spoil the last channel, which is dropped
            into_keys = d_logits.mT @ queries[tile.queries]
            d_keys[tile.keys] += into_keys
            _add_decay_gradients(tile, d_logits, into_keys[..., -1], d_queries[tile.queries][..., -3], d_c, d_e)
        return d_queries[..., :-3].mul(ctx.scale), d_keys[..., :-3], d_values, d_c, d_e, None, None, None


def _operands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, K+3), (N, T, K+3), (N, T, V+1): the last channels of queries and keys are set tile by tile."""
    queries, keys, values = _widen(q, 3), _widen(k, 3), _widen(v, 1)
    queries[..., :-3].mul_(scale)
    queries[..., -2:], keys[..., -3:], values[..., -1] = 1.0, 0.0, 1.0
    return queries, keys, values


def _widen(x: Tensor, channels: int) -> Tensor:
    """A contiguous copy of x with further channels at the end, not yet set."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + channels)
    wide[..., : x.shape[-1]] = x
    return wide


def _tiles(queries: Tensor, keys: Tensor, decay: Decay) -> Iterator[Tile]:
    """Rows from first to last, and for each the heads in groups, with the keys that can matter to them."""
    count, length = decay.c.shape
    least, most = _least_decay(queries, keys), at_once(queries, LOGITS)
    for a in range(0, length, ROWS):
        b = min(a + ROWS, length)
        first = 0 if decay.window is None else max(0, a - decay.window + 1)
        starts, ends = [0] * count, [b] * count
        if first < a:
            starts = _first(decay.c[:, a:b].amax(1, keepdim=True) - decay.c[:, first:a] >= least)
        if decay.e is not None and b < length:
            ends = _first((decay.e[:, b:] - decay.e[:, a:b].amin(1, keepdim=True) >= least).flip(1))
            ends = [length - skipped for skipped in ends]
        n0, s, t = 0, starts[0], ends[0]
        for n1 in range(1, count):
            wider = min(s, starts[n1]), max(t, ends[n1])
            if (n1 + 1 - n0) * (b - a) * (wider[1] - wider[0] - first) > most:
                yield Tile(n0, n1, a, b, first + s, t)
                n0, wider = n1, (starts[n1], ends[n1])
            s, t = wider
        yield Tile(n0, count, a, b, first + s, t)


def _least_decay(queries: Tensor, keys: Tensor) -> Tensor:
    """(N, 1): log(eps / T) - 2 U, the D below which a key cannot matter."""
    top_query, top_key = (
        torch.linalg.vector_norm(x[..., :-3], dim=-1).amax(1, keepdim=True).double() for x in (queries, keys)
    )
    return _negligible(queries) - 2 * top_query * top_key


def _negligible(queries: Tensor) -> float:
    """log(eps / T): T weights this small beside a weight of 1 do not change its last digit."""
    return math.log(torch.finfo(queries.dtype).eps / queries.shape[1])


def _first(kept: Tensor) -> list[int]:
    """How many columns come before the first kept one, in every row."""
    return torch.where(kept.any(1), kept.to(torch.uint8).argmax(1), kept.shape[1]).tolist()


def _logits(tile: Tile, queries: Tensor, keys: Tensor, decay: Decay, lse: Tensor | None) -> Tensor:
    """(n, b - a, t - s): scale q . k + D - lse, -inf where a key may not be seen.

    Query channels: c_i - lse_i, -e_i - lse_i, 1. Key channels: 1 for earlier tokens, 1 for later ones, the key's own
    part of D. The tokens of the tile itself have none: D is no outer sum there.
    """
    dtype, heads = queries.dtype, slice(tile.n0, tile.n1)
    left, right = tile.a - tile.s, tile.b - tile.s
    q, k = queries[tile.queries], keys[tile.keys]
    shift = torch.zeros(()) if lse is None else lse.double()
    c = decay.c[heads, tile.s : tile.b]
    c = c - c[:, left : left + 1]
    c_query, c_key = (c[:, left:] - shift).to(dtype), -c.to(dtype)
    q[..., -3] = c_query
    k[:, :left, -3], k[:, left:, -3] = 1.0, 0.0
    k[:, :left, -1], k[:, left:, -1] = c_key[:, :left], 0.0
    own = c_query[..., None] + c_key[:, None, left:]
    past = torch.ones(right - left, right - left, dtype=torch.bool, device=own.device).tril()
    if decay.e is None:
        own.masked_fill_(~past, -math.inf)
    else:
        e = decay.e[heads, tile.a : tile.t]
        e = e - e[:, :1]
        e_query, e_key = -(e[:, : right - left] + shift).to(dtype), e.to(dtype)
        q[..., -2] = e_query
        k[:, :right, -2], k[:, right:, -2] = 0.0, 1.0
        k[:, right:, -1] = e_key[:, right - left :]
        own = torch.where(past, own, e_query[..., None] + e_key[:, None, : right - left])
    if decay.real is not None:
        k[..., -1].masked_fill_(~decay.real[tile.keys], -math.inf)
    logits = q @ k.mT
    logits[..., left:right] += own
    if decay.window is not None:
        steps = torch.arange(tile.s, tile.b, device=logits.device)
        logits.masked_fill_(steps[left:, None] - steps >= decay.window, -math.inf)
    return logits


def _add_decay_gradients(
    tile: Tile, d_logits: Tensor, columns: Tensor, before: Tensor, d_c: Tensor, d_e: Tensor | None
) -> None:
    """Adds what D of this tile gives to the gradients of c and e; every whole row of d_logits sums to 0.

    columns (n, t - s): sums of d_logits over the rows; before (n, b - a): its sums over the keys before the tile.
    """
    heads, left, right = slice(tile.n0, tile.n1), tile.a - tile.s, tile.b - tile.s
    if d_e is None:
        d_c[heads, tile.s : tile.t] -= columns
        return
    lower = d_logits[..., left:right].tril(-1)  # the square of the tile's own tokens: c has the lower half, e the upper
    before, lower_columns = before + lower.sum(2), lower.sum(1)
    d_c[heads, tile.s : tile.a] -= columns[:, :left]
    d_c[heads, tile.a : tile.b] += before - lower_columns
    d_e[heads, tile.a : tile.b] += columns[:, left:right] - lower_columns + before
    d_e[heads, tile.b : tile.t] += columns[:, right:]
