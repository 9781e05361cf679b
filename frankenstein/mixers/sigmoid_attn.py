"""Sigmoid attention: Ramapuram et al. 2024, https://arxiv.org/abs/2409.04431.

    o_i = sum_j sigmoid(scale q_i . k_j + b) v_j          no normalization of the rows

b = -log n keeps the sum of the n weights near 1 at the start.
Shapes: q, k (B, T, H, K); v (B, T, H, V).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, at_once, repeat_heads
from frankenstein.options import option

Bias = float | Tensor | None
_TILE, _ROWS = 1 << 18, 64  # numbers of a tile: 1 MB; queries and keys of one, at least


def sigmoid_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Bias = None,
) -> Tensor:
    """The equation above, written out. Arguments as `sigmoid_attention`."""
    length = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = -math.log(length) if bias is None else bias
    weights = (torch.einsum("bihk,bjhk->bhij", q, k) * scale + bias).sigmoid()
    if causal:
        weights = weights.tril()
    if key_padding_mask is not None:
        weights = weights * key_padding_mask[:, None, None, :]
    return torch.einsum("bhij,bjhv->bihv", weights, v)


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Bias = None,
) -> Tensor:
    """Attention with independent sigmoid weights, in tiles that a cache holds; memory is linear in T.

    The backward pass makes the weights again.
    Source: Ramapuram et al. 2024, section 2, https://arxiv.org/abs/2409.04431.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        key_padding_mask: (B, T) bool, True for keys that may be attended; the others get weight 0.
        causal: query i sees the keys j <= i only.
        scale: of the dot products; None means K**-0.5.
        bias: number or tensor that broadcasts to (B, H, T, T), added to the logits; None means -log T. A tensor that
            wants a gradient takes T^2 memory.
    Returns:  (B, T, H, V).
    """
    length = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = -math.log(length) if bias is None else bias
    if isinstance(bias, Tensor) and bias.requires_grad:
        return sigmoid_dense(q, k, v, key_padding_mask=key_padding_mask, causal=causal, scale=scale, bias=bias)
    if key_padding_mask is not None:
        v = v.masked_fill(~key_padding_mask[:, :, None, None], 0.0)
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q * scale, k, v))
    o: Tensor = _SigmoidAttention.apply(queries, keys, values, _Logits(bias, q.shape[2], causal))
    return o.unflatten(0, (-1, q.shape[2])).transpose(1, 2)


@dataclass(frozen=True)
class _Logits:
    """What the logits have besides q k^T, and the tiles that they are computed in."""

    bias: float | Tensor
    heads: int
    causal: bool

    def tiles(self, q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of q (B H, T, K): whole examples, queries, and keys; together all pairs that are allowed."""
        count, length, _ = q.shape
        room = at_once(q, _TILE)
        examples = max(1, room // (self.heads * length**2)) * self.heads
        rows = max(_ROWS, room // (examples * length))
        columns = max(_ROWS, room // (examples * rows))
        for first in range(0, count, examples):
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                seen = stop if self.causal else length
                for left in range(0, seen, columns):
                    yield slice(first, first + examples), slice(start, stop), slice(left, min(left + columns, seen))

    def weights(self, q: Tensor, k: Tensor, tile: tuple[slice, slice, slice]) -> Tensor:
        """(n, L, M) of one tile, at least in float32."""
        some, rows, keys = tile
        x = q[some, rows] @ k[some, keys].mT
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(self.bias, Tensor):
            x.unflatten(0, (-1, self.heads)).add_(self._part(self.bias, tile))
        else:
            x.add_(self.bias)
        if self.causal:
            i, j = (torch.arange(s.start, s.stop, device=q.device) for s in (rows, keys))
            x.masked_fill_(j > i[:, None], float("-inf"))
        return x.sigmoid_()

    def _part(self, bias: Tensor, tile: tuple[slice, slice, slice]) -> Tensor:
        some, rows, keys = tile
        bias = bias[(None,) * (4 - bias.ndim)]
        examples = slice(some.start // self.heads, some.stop // self.heads)
        wanted = zip(bias.shape, (examples, slice(None), rows, keys), strict=True)
        return bias[tuple(slice(None) if size == 1 else part for size, part in wanted)]


class _SigmoidAttention(torch.autograd.Function):
    """q, k, v (B H, T, .), q multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, logits: _Logits) -> Tensor:
        o = _zeros(v)
        for tile in logits.tiles(q):
            some, rows, keys = tile
            _add_product(o[some, rows], logits.weights(q, k, tile).to(v.dtype), v[some, keys])
        ctx.save_for_backward(q, k, v)
        ctx.logits = logits
        return o.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        grad, grad_q, grad_k, grad_v = grads[0].contiguous(), *(_zeros(x) for x in (q, k, v))
        for tile in ctx.logits.tiles(q):
            some, rows, keys = tile
            weights = ctx.logits.weights(q, k, tile)
            change = (grad[some, rows] @ v[some, keys].mT).to(weights.dtype)
            change = torch.ops.aten.sigmoid_backward(change, weights).to(q.dtype)
            _add_product(grad_q[some, rows], change, k[some, keys])
            _add_product(grad_k[some, keys], change.mT, q[some, rows])
            _add_product(grad_v[some, keys], weights.to(v.dtype).mT, grad[some, rows])
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _zeros(x: Tensor) -> Tensor:
    """For sums over tiles: contiguous, at least float32."""
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in place; total may have a wider type."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)


@MIXERS.register("sigmoid_attn")
class SigmoidAttention(Mixer):
    """Multi-head sigmoid attention.

    Source: Ramapuram et al. 2024, sections 2 and 5, https://arxiv.org/abs/2409.04431. Their bias is the constant
    -log(training length), since all their rows are full; the default here counts each row's own tokens, so that a short
    sentence gets weights of the same size as a full row and padding changes nothing.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of `sigmoid_attn`."""

        bias: str = option(
            "tokens",
            "Bias -log n, with n the real tokens that a query sees, or the pretraining row length.",
            enum=["tokens", "max_length"],
        )
        stabilizer: str = option(
            "none",
            "What follows the output projection: nothing, RMSNorm, or a learned scale per channel.",
            enum=["none", "hybrid_norm", "layer_scale"],
        )
        layer_scale_init: float = option(1e-4, "First value of the layer_scale parameters.", exclusiveMinimum=0.0)

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width = context.hidden_size
        self.causal, self.bias, self.max_length = context.causal, options.bias, context.max_length
        self.num_heads = context.num_heads
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(width, eps=1e-6) if options.stabilizer == "hybrid_norm" else None
        scaled = options.stabilizer == "layer_scale"
        self.layer_scale = nn.Parameter(torch.full((width,), options.layer_scale_init)) if scaled else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        bias = self._logit_bias(x, mask)
        y = self.out(sigmoid_attention(q, k, v, key_padding_mask=mask, causal=self.causal, bias=bias).flatten(2))
        if self.norm is not None:
            y = self.norm(y)
        return y if self.layer_scale is None else y * self.layer_scale

    def _logit_bias(self, x: Tensor, mask: Tensor | None) -> Bias:
        if self.bias == "max_length":
            return -math.log(self.max_length)
        if self.causal:  # query i sees i + 1 keys; counting the whole row would tell it about the future
            return -torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).log()[:, None]
        if mask is None:
            return None
        return -mask.sum(1).clamp(min=1).to(x.dtype).log()[:, None, None, None]
