"""Softmax attention over the kept pairs of a static pattern only, cut into dense pieces and merged in one softmax.

    o_i = sum_(j in A_i) softmax_j(scale q_i . k_j) v_j,    A_i the disjoint union of the pieces' A_i^n
    l_i = log sum_n exp l_i^n,   o_i = sum_n exp(l_i^n - l_i) o_i^n,    l^n the logsumexp of piece n, o^n its output

Backward, the weight of a pair is exp(logit - l_i), whatever its piece: every piece needs only l, o and the gradient of
o, so no weights are stored, and memory is linear in T.
Source: the softmax statistics of Dao et al. 2022, "FlashAttention", section 3.1, https://arxiv.org/abs/2205.14135.
Shapes: q, k (B, T, H, K); v (B, T, H, V). A piece is b x h dense products of L queries and S keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Added to the logits of pairs that do not count; finite, so that a query without any key in a piece makes no NaN.
FLOOR = -1e30
# Queries that share one slice of keys in a band: the fastest of 32 .. 512 on CPU, for bands of 128 to 512.
TILE = 64
# Rows up to this length are one piece where the tiles of a band would hold most of their pairs: a tile costs about 1.6
# times as much per pair. Longer rows stay in tiles, whose biases are small.
ONE_PIECE = 1024


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, scale: float | None = None) -> Tensor:
    """The equation above, written out; `allowed` broadcasts to (B, H, T, T); a query without any key gets 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    weights = logits.masked_fill(~allowed, FLOOR).softmax(-1).masked_fill(~allowed, 0.0)
    return torch.einsum("bhij,bjhv->bihv", weights, v)


class Rows(ABC):
    """Which tokens a piece takes from (B, T, H, K), and how they lie in (b, L, h, K)."""

    @abstractmethod
    def read(self, x: Tensor) -> Tensor:
        """(B, T, H, K) to (b, L, h, K). Of queries it must share memory with x: outputs are written through it."""

    def add_(self, x: Tensor, update: Tensor) -> None:
        """Add (b, L, h, K) to the tokens of x that `read` takes."""
        self.read(x).add_(update)


@dataclass(frozen=True)
class Tokens(Rows):
    """The tokens start .. stop-1 of the rows from `rows[0]` to before `rows[1]`: (b, stop - start, H, K)."""

    start: int
    stop: int
    rows: tuple[int, int | None] = (0, None)

    def read(self, x: Tensor) -> Tensor:
        return x[slice(*self.rows), self.start : self.stop]


@dataclass(frozen=True)
class Segments(Rows):
    """The first `stop` tokens of every segment of `size`, each segment by itself: (B T / size, stop, H, K)."""

    size: int
    stop: int

    def read(self, x: Tensor) -> Tensor:
        return x.view(-1, self.size, *x.shape[2:])[:, : self.stop]


class Piece(NamedTuple):
    """All pairs of some queries with some keys.

    `bias` is added to the logits: 0 or `FLOOR`, broadcast to (b, h, L, S); None adds nothing. See `additive`.
    """

    queries: Rows
    keys: Rows
    bias: Tensor | None = None


def additive(allowed: Tensor, like: Tensor) -> Tensor | None:
    """The bias of a bool (b, h, L, S), with 1 for dimensions that do not matter; None where all pairs count."""
    if allowed.all():
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(allowed.shape, dtype=dtype, device=like.device).masked_fill_(~allowed, FLOOR)


def band(
    q: Tensor, length: int, reach: int, *, first: int = 0, with_self: bool = True, mask: Tensor | None, causal: bool
) -> list[Piece]:
    """Pieces of the pairs with |i - j| <= reach or j < first, for the queries i = first .. length-1.

    Args:
        q: gives dtype and device; its token 0 is the query `first`.
        with_self: whether i = j counts.
        mask: (B, T) bool, True for real tokens, which come first; a causal band needs none.
        causal: only j <= i.
    """
    shortest = length if mask is None or causal else int(mask.sum(1).min())
    span = TILE + (reach if causal else 2 * reach)
    whole = 1.6 * span > length if length <= ONE_PIECE else reach >= length - 1 and not causal
    shared: dict[tuple[int, int, int], Tensor | None] = {}
    pieces = []
    for start in range(first, length, length if whole else TILE):
        stop = length if whole else min(start + TILE, length)
        low = 0 if whole else max(first, start - reach)
        high = stop if causal else min(length, stop + reach)
        place = (start - low, stop - start, high - low)
        bias = shared.get(place)
        if high > shortest or place not in shared:
            keys = torch.arange(low, high, device=q.device)
            distance = torch.arange(start, stop, device=q.device)[:, None] - keys
            allowed = (distance <= reach) & (distance >= (0 if causal else -reach)) | (keys < first)
            allowed = (allowed if with_self else allowed & (distance != 0))[None, None]
            if mask is not None and high > shortest:
                per_key = allowed[..., :1, :] if allowed.all() else allowed
                bias = additive(per_key & mask[:, None, None, low:high], q)
            else:
                bias = shared[place] = additive(allowed, q)
        pieces.append(Piece(Tokens(start - first, stop - first), Tokens(low, high), bias))
    if first and not whole:
        seen = None if mask is None or causal else additive(mask[:, None, None, :first], q)
        pieces.append(Piece(Tokens(0, length - first), Tokens(0, first), seen))
    return pieces


def merged_attention(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], *, scale: float | None = None) -> Tensor:
    """One softmax over all pairs of disjoint pieces; cost and memory grow with the pairs that they hold.

    Args:
        q: (B, Tq, H, K); k: (B, T, H, K); v: (B, T, H, V); Tq may differ from T.
        pieces: no pair may stand in two of them. A query without any pair gets a finite value without meaning.
        scale: of the dot products; None means K**-0.5.
    Returns:  (B, Tq, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _MergedAttention.apply(q, k, v, pieces, scale)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
        o = q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse = q.new_full((*q.shape[:-1], 1), FLOOR, dtype=_precision(q))
        for queries, keys, bias in pieces:
            part, part_lse = _attend(queries.read(q), keys.read(k), keys.read(v), bias, scale)
            whole, whole_lse = queries.read(o), queries.read(lse)
            whole.lerp_(part, (part_lse - whole_lse).sigmoid_().to(o.dtype))
            whole_lse.copy_(torch.logaddexp(whole_lse, part_lse))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.pieces, ctx.scale = pieces, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, o, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        for queries, keys, bias in ctx.pieces:
            inputs = queries.read(q), keys.read(k), keys.read(v)
            results = queries.read(o), queries.read(lse), queries.read(grad)
            dq, dk, dv = _attend_backward(*inputs, *results, bias, ctx.scale)
            queries.add_(grad_q, dq)
            keys.add_(grad_k, dk)
            keys.add_(grad_v, dv)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _precision(x: Tensor) -> torch.dtype:
    """Of logsumexps and of sums over pieces."""
    return torch.promote_types(x.dtype, torch.float32)


def _fused(q: Tensor, v: Tensor) -> bool:
    """Whether torch's fused CPU kernel takes these shapes; it wants K = V."""
    return q.is_cpu and q.shape[-1] == v.shape[-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output (b, L, h, V) and logsumexp (b, L, h, 1) of one piece."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _fused(q, v):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        return o.transpose(1, 2), lse.transpose(1, 2)[..., None]
    logits = _logits(q, k, bias, scale)
    lse = logits.logsumexp(-1, keepdim=True)
    return ((logits - lse).exp().to(v.dtype) @ v).transpose(1, 2), lse.transpose(1, 2)


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, grad: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from one piece, given o and its logsumexp over all pieces."""
    q, k, v, o, lse, grad = (x.transpose(1, 2) for x in (q, k, v, o, lse, grad))
    if _fused(q, v):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, lse[..., 0], 0.0, False, attn_mask=bias, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in grads)
    weights = (_logits(q, k, bias, scale) - lse).exp()
    change = weights * ((grad @ v.mT).to(lse.dtype) - (grad * o).sum(-1, keepdim=True, dtype=lse.dtype)) * scale
    weights, change = weights.to(v.dtype), change.to(q.dtype)
    return (change @ k).transpose(1, 2), (change.mT @ q).transpose(1, 2), (weights.mT @ grad).transpose(1, 2)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = (q @ k.mT).to(_precision(q)) * scale
    return logits if bias is None else logits + bias
