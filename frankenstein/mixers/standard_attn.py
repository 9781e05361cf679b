"""Softmax attention: Vaswani et al. 2017, section 3.2, https://arxiv.org/abs/1706.03762.

    o_i = sum_j softmax_j(scale q_i . k_j) v_j

Shapes: q, k (B, T, H, K); v (B, T, H, V).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.mixers import short_attention
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads

Scores = Callable[[Tensor, Tensor], Tensor] | None


def softmax_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The equation above, written out; every query needs at least one key. Arguments as `softmax_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    allowed = _allowed_pairs(q.shape[1], key_padding_mask, causal, q.device)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhij,bjhv->bihv", logits.softmax(-1), v)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    scores: Scores = None,
) -> Tensor:
    """Softmax attention by torch's fused kernel; with `scores`, from dot products that are computed first.

    Source: Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        key_padding_mask: (B, T) bool, True for keys that may be attended; a query without any key gets 0.
        causal: query i sees the keys j <= i only.
        scale: of the dot products; None means K**-0.5.
        scores: gives (B, H, T, T) in place of q k^T, as `hope.Hope` does.
    Returns:  (B, T, H, V).
    """
    if scores is not None:
        logits = scores(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        return _attend(logits, v, _allowed_pairs(q.shape[1], key_padding_mask, causal, q.device))
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    short = short_attention.pays(queries, keys)
    alone = key_padding_mask is None and causal and not short
    allowed = None if alone else _allowed_pairs(q.shape[1], key_padding_mask, causal, q.device)
    if short:
        return short_attention.attend(queries, keys, values, allowed, scale).transpose(1, 2)
    o = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, is_causal=alone, scale=scale)
    return o.transpose(1, 2)


def _attend(logits: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(logits) v; a query without any key gets 0."""
    if allowed is None:
        weights = logits.softmax(-1)
    else:
        alone = ~allowed.any(-1, keepdim=True)  # sees all keys for the moment: no NaN in values or gradients
        weights = logits.masked_fill(~(allowed | alone), float("-inf")).softmax(-1).masked_fill(alone, 0.0)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def _allowed_pairs(length: int, key_padding_mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """Bool that broadcasts to (B, H, T, T), True where query i may see key j; None allows all."""
    allowed = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if causal:
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        allowed = past if allowed is None else allowed & past
    return allowed


@MIXERS.register("standard_attn")
class StandardAttention(Mixer):
    """Multi-head softmax attention, with rotary or hyperbolic positions where the encoder has them.

    Source: Vaswani et al. 2017, section 3.2.2, https://arxiv.org/abs/1706.03762; seed 002 eq. 33.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")

    @dataclass(frozen=True)
    class Options:
        """Softmax attention has no options of its own."""

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        self.causal, self.num_heads, self.scores = context.causal, context.num_heads, context.scores
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        o = softmax_attention(q, k, v, key_padding_mask=mask, causal=self.causal, scores=self.scores)
        return self.out(o.flatten(2))
