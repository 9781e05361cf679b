"""Softmax attention of short rows in bfloat16 on a CPU with tiles for it (AMX): the whole matrix of weights at once.

    S = scale Q K^T    P = softmax(S)    O = P V
    dV = P^T dO    dS = P * (dO V^T - rowsum(dO * O))    dQ = scale dS K    dK = scale dS^T Q

torch's fused kernel keeps no P, but takes 3.5 times as long there with 128 tokens and 1.4 times as long with 256,
forward and backward (measured). S is float32, as in the fused kernel, for a few heads at a time, which stay in the
cache; everything else that is kept or multiplied is bfloat16.
Shapes: Q (B, H, I, K); K, V (B, H, J, K).
"""

from typing import Any

import torch
from torch import Tensor

from frankenstein.runtime import product_dtype

LONGEST = 256  # queries and keys; beyond, P takes more memory than it saves time
_TILES = bool(torch.cpu.get_capabilities().get("amx_bf16"))
_SCORES = 1 << 18  # entries of S at once: 1 MB


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether this form is the faster one for q (B, H, I, K) and k (B, H, J, K), gradients wanted."""
    if not (q.is_cpu and _TILES) or max(q.shape[2], k.shape[2]) > LONGEST:
        return False
    return torch.is_grad_enabled() and product_dtype(q) == torch.bfloat16


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None = None) -> Tensor:
    """(B, H, I, V) in bfloat16.

    Args:
        q, k, v: (B, H, I, K), (B, H, J, K), (B, H, J, V).
        allowed: bool that broadcasts to (B, H, I, J), True where a query may see a key; None allows all. A query that
            sees none gets 0.
        scale: of the dot products; None means K**-0.5.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        o: Tensor = _Attention.apply(*(x.to(torch.bfloat16) for x in (q, k, v)), allowed, scale)
    return o


def _softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Over the last dimension; 0 where not allowed."""
    if allowed is None:
        return scores.softmax(-1)
    hidden = ~allowed
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill_(hidden, 0.0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))  # the batched product copies strided ones slowly
        allowed = None if allowed is None else allowed.expand(*q.shape[:3], k.shape[2]).flatten(0, 1)
        queries, keys = q.flatten(0, 1).float() * scale, k.flatten(0, 1).float().mT
        if torch.compiler.is_compiling():  # the compiler would write out every slice
            weights = _softmax(queries @ keys, allowed).to(q.dtype).view(*q.shape[:3], k.shape[2])
        else:
            weights = q.new_empty(*q.shape[:3], k.shape[2])
            step = max(1, _SCORES // (q.shape[2] * k.shape[2]))
            for start in range(0, len(queries), step):
                some = slice(start, start + step)
                seen = None if allowed is None else allowed[some]
                weights.flatten(0, 1)[some] = _softmax(queries[some] @ keys[some], seen)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.contiguous()
        # The backward pass of softmax is P * (dP - rowsum(P * dP)), and rowsum(P * dP) = rowsum(dO * O).
        d_scores = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype).mul_(ctx.scale)
        return d_scores @ k, d_scores.mT @ q, weights.mT @ grad, None, None
