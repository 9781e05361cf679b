"""Multi-head latent attention: DeepSeek-V2, section 2.1, https://arxiv.org/abs/2405.04434.

    c^Q = norm(W_DQ x)          q^C = W_UQ c^Q    q^R = rope(W_QR c^Q)    c^Q = x without query compression
    c^KV = norm(W_DKV x)        k^C = W_UK c^KV   k^R = rope(W_KR x)      v = W_UV c^KV
    o_i = sum_j softmax_j((q^C_i . k^C_j + q^R_i . k^R_j) / sqrt(N + R)) v_j

All heads read keys and values from one latent vector c^KV a token and share one rotary key k^R.
Shapes: q (B, T, H, N + R), [q^C; q^R]; k_nope (B, T, H, N), k^C; k_rope (B, T, R), k^R; v (B, T, H, V); latent
(B, T, C), c^KV.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.standard_attn import Scores, softmax_attention
from frankenstein.options import option


def mla_dense(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The last line of the equations above, written out; every query needs at least one key."""
    content, rotary = q.split((k_nope.shape[-1], k_rope.shape[-1]), -1)
    logits = torch.einsum("bihn,bjhn->bhij", content, k_nope) + torch.einsum("bihr,bjr->bhij", rotary, k_rope)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_padding_mask is not None:
        logits = logits.masked_fill(~key_padding_mask[:, None, None, :], float("-inf"))
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhij,bjhv->bihv", logits.softmax(-1), v)


def mla_attention(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    scores: Scores = None,
) -> Tensor:
    """Latent attention on expanded keys and values, by torch's fused kernel in linear memory.

    Source: DeepSeek-V2, eq. 14-18, https://arxiv.org/abs/2405.04434.
    Args:
        q: (B, T, H, N + R), its last R channels turned by position.
        k_nope: (B, T, H, N).
        k_rope: (B, T, R), turned by position, shared by all heads.
        v: (B, T, H, V).
        key_padding_mask: (B, T) bool, True for keys that may be attended; a query without any key gets 0.
        causal: query i sees the keys j <= i only.
        scale: of the dot products; None means (N + R)**-0.5.
        scores: gives (B, H, T, T) in place of q^R k^R, as `hope.Hope` does; takes memory (T, T).
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    value = v.shape[-1]
    k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)], -1)
    if scores is None:
        # The fused kernel wants one width for all; without it torch would store the weights (T, T).
        wide = max(q.shape[-1], value)
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
    else:
        scores = _decoupled(scores, k_nope.shape[-1])
    o = softmax_attention(q, k, v, key_padding_mask=key_padding_mask, causal=causal, scale=scale, scores=scores)
    return o[..., :value]


def mla_absorbed(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_key: Tensor,
    up_value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Latent attention without expanded keys and values: all heads attend to the latent vectors themselves.

    q^C . (W_UK c) = (W_UK^T q^C) . c, and W_UV is applied after the sum: the same function, from C + R numbers a token.
    Source: DeepSeek-V2, section 2.1.2 and appendix C, https://arxiv.org/abs/2405.04434.
    Args:
        latent: (B, T, C), normalized.
        up_key: (H, N, C); up_value: (H, V, C).
        The others as `mla_attention`, with k_nope = up_key latent and v = up_value latent.
    Returns:  (B, T, H, V).
    """
    content, rotary = q.split((up_key.shape[1], k_rope.shape[-1]), -1)
    query = torch.cat([torch.einsum("bthn,hnc->bthc", content, up_key), rotary], -1)
    # Values are the keys, rotary channels and all: one tensor serves as both, and the rest is dropped afterwards.
    key = torch.cat([latent, k_rope], -1)[:, :, None].expand(-1, -1, len(up_key), -1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    read = softmax_attention(query, key, key, key_padding_mask=key_padding_mask, causal=causal, scale=scale)
    return torch.einsum("bthc,hvc->bthv", read[..., : latent.shape[-1]], up_value)


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """The norm in the precision of its weights, as the authors compute it, also under autocast."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def _decoupled(scores: Callable[[Tensor, Tensor], Tensor], content: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Plain dot products of the first `content` channels, plus `scores` of the others."""

    def dots(q: Tensor, k: Tensor) -> Tensor:
        plain = q[..., :content].transpose(1, 2) @ k[..., :content].permute(0, 2, 3, 1)
        return plain + scores(q[..., content:], k[..., content:])

    return dots


@MIXERS.register("mla_attn")
class MultiHeadLatentAttention(Mixer):
    """Softmax attention whose keys and values come from one low-rank vector a token.

    Source: DeepSeek-V2, section 2.1, https://arxiv.org/abs/2405.04434; DeepSeek-V3, section 2.1.1,
    https://arxiv.org/abs/2412.19437. The compressed vectors are normalized, as in section 3.1.2 of the first; the
    scaling factors it mentions are not in the authors' code, https://github.com/deepseek-ai/DeepSeek-V3, nor here. The
    default sizes are those of DeepSeek-V2-Lite in proportion (hidden size 2048, 16 heads of 128 channels and 64 rotary
    ones, rank 512, queries not compressed). Every head has keys and values of its own, whatever model.num_kv_heads is.
    HoPE, which the paper does not have, takes the place of the rotation in the decoupled channels. An encoder has no
    cache to shrink: what the latent saves is weights, and time where `kv_lora_rank` is below a head's width, as the
    heads then attend to the latent vectors themselves.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")

    @dataclass(frozen=True)
    class Options:
        """Options of `mla_attn`."""

        kv_lora_rank: int | None = option(
            None,
            "Width of the vector that keys and values are compressed to; null takes 4 x hidden_size / num_heads, at "
            "most a quarter of hidden_size.",
            minimum=1,
        )
        q_lora_rank: int | None = option(
            None, "Width of the vector that queries are compressed to; null leaves them uncompressed.", minimum=1
        )
        qk_nope_head_dim: int | None = option(
            None,
            "Channels of a head's queries and keys without position; null takes hidden_size / num_heads.",
            minimum=1,
        )
        qk_rope_head_dim: int | None = option(
            None,
            "Further channels, an even number, of a head's queries and of one key that all heads share; they carry the "
            "position; null takes half of hidden_size / num_heads.",
            minimum=2,
        )
        v_head_dim: int | None = option(
            None, "Channels of a head's values; null takes hidden_size / num_heads.", minimum=1
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width, heads = context.hidden_size, context.num_heads
        head = width // heads
        self.causal, self.num_heads = context.causal, heads
        self.rotary, self.scores = context.rotary, context.scores
        self.nope = head if options.qk_nope_head_dim is None else options.qk_nope_head_dim
        self.rope = 2 * math.ceil(head / 4) if options.qk_rope_head_dim is None else options.qk_rope_head_dim
        self.value = head if options.v_head_dim is None else options.v_head_dim
        self.rank = max(1, min(4 * head, width // 4)) if options.kv_lora_rank is None else options.kv_lora_rank
        if self.rope % 2:
            raise FrankensteinError(
                f"model.mixers.mla_attn.qk_rope_head_dim={self.rope}: positions turn pairs of channels; expected an "
                "even number"
            )
        queries = heads * (self.nope + self.rope)
        self.query_rank = queries if options.q_lora_rank is None else options.q_lora_rank
        # W_DQ (or the queries themselves), W_DKV and W_KR, all of which read x.
        self.down = nn.Linear(width, self.query_rank + self.rank + self.rope, bias=False)
        compressed = options.q_lora_rank is not None
        self.query_norm = RMSNorm(self.query_rank, eps=1e-6) if compressed else None
        self.up_query = nn.Linear(self.query_rank, queries, bias=False) if compressed else None
        self.norm = RMSNorm(self.rank, eps=1e-6)
        self.up: nn.Module = nn.Linear(self.rank, heads * (self.nope + self.value), bias=False)
        self.out = nn.Linear(heads * self.value, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, latent, k_rope = self.down(x).split((self.query_rank, self.rank, self.rope), -1)
        if self.query_norm is not None and self.up_query is not None:
            q = self.up_query(_normed(q, self.query_norm))
        q, latent = q.unflatten(-1, (self.num_heads, -1)), _normed(latent, self.norm)
        if self.rotary is not None:
            # Slices may begin at an odd channel, where no complex number can.
            content, turned = q[..., : self.nope], self.rotary(q[..., self.nope :].contiguous())
            q = torch.cat([content, turned], -1)
            k_rope = self.rotary(k_rope[:, :, None].contiguous())[:, :, 0]
        return self.out(self._attend(q, latent, k_rope, mask).flatten(2))

    def _attend(self, q: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, V), by whichever form has the narrower dot products and sums."""
        real = None if self.causal else mask  # padding comes last: a causal query never sees it
        narrow = self.rank + self.rope < max(self.nope + self.rope, self.value)
        # A layer that took the place of the linear one, such as a ternary one, need not be a matrix.
        if narrow and self.scores is None and isinstance(self.up, nn.Linear):
            up_key, up_value = self.up.weight.unflatten(0, (self.num_heads, -1)).split((self.nope, self.value), 1)
            return mla_absorbed(q, latent, k_rope, up_key, up_value, key_padding_mask=real, causal=self.causal)
        k_nope, v = self.up(latent).unflatten(-1, (self.num_heads, -1)).split((self.nope, self.value), -1)
        return mla_attention(q, k_nope, k_rope, v, key_padding_mask=real, causal=self.causal, scores=self.scores)
