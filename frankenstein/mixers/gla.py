"""Gated linear attention: Yang et al. 2024, https://arxiv.org/abs/2312.06635.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t        (their eq. 3)

An encoder reads both ways: y = f(x) + flip(f(flip x)) - f1(x), with f the recurrence above, flip the reversal of time
and f1 the recurrence on every token alone, which both directions count: f1 = scale (q_t . k_t) v_t.
Shapes: q, k (B, T, H, K); v (B, T, H, V); log decay g (B, T, H, K), <= 0; state S (B, H, K, V).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.chunked_gla import gla_chunked
from frankenstein.mixers.short_conv import ShortConv
from frankenstein.options import option


def gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `gla`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state if output_final_state else None


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Causal gated linear attention, dense inside chunks and recurrent between them: linear in T.

    Source: Yang et al. 2024, section 4, https://arxiv.org/abs/2312.06635. All factors are products of exp(g) <= 1, so
    that strong decay underflows to 0 and nothing overflows; g = -inf forgets all. Computed in float32 at least.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        g: (B, T, H, K), log of the decay of the key channels before the write, <= 0; 0 keeps everything.
        scale: of the output; None means K**-0.5.
        initial_state: (B, H, K, V); None means zeros.
        output_final_state: return the last state, else None in its place.
        chunk_size: largest C, a power of two, in tokens; any T works.
    Returns:  output (B, T, H, V), final state (B, H, K, V) or None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = gla_chunked(q, k, v, g, scale=scale, initial_state=initial_state, chunk_size=chunk_size)
    return o, state if output_final_state else None


def bidirectional_gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    g_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The rule of the module docstring, from the recurrence. Arguments as `bidirectional_gla`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g_rev = g if g_rev is None else g_rev
    real = 1.0 if mask is None else mask[:, :, None, None]
    k, v = k * real, v * real
    forward, _ = gla_recurrent(q, k, v, g, scale=scale)
    backward, _ = gla_recurrent(q.flip(1), k.flip(1), v.flip(1), g_rev.flip(1), scale=scale)
    alone = scale * (q * k).sum(-1, keepdim=True) * v
    return (forward + backward.flip(1) - alone) * real


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    g_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Gated linear attention in both directions, dense inside chunks and recurrent between them: linear in T.

    Source: the sum of both directions with the diagonal counted once is the mask of LION-S, Afzal et al. 2025,
    https://arxiv.org/abs/2502.16249, here per channel, without its row normalization, and with the decay of the token
    that reads, not of the one that is read, as in the recurrence.
    Args:
        g_rev: (B, T, H, K), decay of the direction from right to left, in the order of the tokens; None means g.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `gla`.
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    padded = None if mask is None else ~mask[:, :, None, None]
    if padded is not None:
        k, v, g = (x.masked_fill(padded, 0.0) for x in (k, v, g))
        g_rev = None if g_rev is None else g_rev.masked_fill(padded, 0.0)
    reverse = None if g_rev is None else (k, g_rev)
    o, _ = gla_chunked(q, k, v, g, scale=scale, chunk_size=chunk_size, reverse=reverse, both_ways=True)
    return o if padded is None else o.masked_fill(padded, 0.0)


@MIXERS.register("gla_attn")
class GatedLinearAttention(Mixer):
    """Gated linear attention with low-rank forget gates, per-head norm and swish output gate.

    Source: Yang et al. 2024, section 4.4, https://arxiv.org/abs/2312.06635; defaults and the optional short convolution
    follow the authors' code, https://github.com/fla-org/flash-linear-attention. In an encoder, both directions share
    queries, keys and values; each has forget gates of its own, as both directions of Vision Mamba and Hydra have. The
    small gate weights are plain parameters: they stay in full precision in a ternary encoder.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the decays tell positions; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `gla_attn`."""

        expand_k: float = option(0.5, "Width of all keys together, relative to hidden_size.", exclusiveMinimum=0.0)
        expand_v: float = option(1.0, "Width of all values together, relative to hidden_size.", exclusiveMinimum=0.0)
        gate_low_rank_dim: int = option(16, "Rank of the forget gate's projection.", minimum=1)
        gate_logit_normalizer: float = option(
            16.0, "Divides the log of the forget gates: larger values forget more slowly.", exclusiveMinimum=0.0
        )
        separate_gates: bool = option(True, "Give each direction of an encoder forget gates of its own.")
        conv_size: int = option(
            0, "Tokens that a short convolution of queries, keys and values covers one way; 0 has none.", minimum=0
        )
        chunk_size: int = option(
            64, "Tokens that are computed densely at once, at most; on a GPU 128 or more.", enum=[16, 32, 64, 128, 256]
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width, self.num_heads, self.causal = context.hidden_size, context.num_heads, context.causal
        self.key_width = _expanded(width, self.num_heads, "expand_k", options.expand_k)
        self.value_width = _expanded(width, self.num_heads, "expand_v", options.expand_v)
        self.normalizer, self.chunk_size = options.gate_logit_normalizer, options.chunk_size
        self.project = nn.Linear(width, 2 * (self.key_width + self.value_width), bias=False)
        mixed = 2 * self.key_width + self.value_width
        self.conv = ShortConv(mixed, options.conv_size, causal=self.causal) if options.conv_size else None
        directions = 2 if options.separate_gates and not self.causal else 1
        rank = options.gate_low_rank_dim
        self.gate_down = nn.Parameter(torch.empty(directions * rank, width).normal_(std=0.02))
        self.gate_up = nn.Parameter(torch.empty(directions, self.key_width, rank).normal_(std=0.02))
        self.gate_bias = nn.Parameter(torch.zeros(directions, self.key_width))
        self.norm = RMSNorm(self.value_width // self.num_heads, eps=1e-5)
        self.out = nn.Linear(self.value_width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        mixed, gate = self.project(x).split((2 * self.key_width + self.value_width, self.value_width), -1)
        if self.conv is not None:
            mixed = F.silu(self.conv(mixed, mask))
        parts = mixed.split((self.key_width, self.key_width, self.value_width), -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        g, *g_rev = self.log_decays(x)
        if self.causal:  # padding comes last, so that no real token sees it
            o, _ = gla(q, k, v, g, chunk_size=self.chunk_size)
        else:
            o = bidirectional_gla(q, k, v, g, g_rev=g_rev[0] if g_rev else None, mask=mask, chunk_size=self.chunk_size)
        return self.out(self.norm(o.to(self.norm.weight.dtype)).flatten(2) * F.silu(gate))

    def log_decays(self, x: Tensor) -> list[Tensor]:
        """(B, T, H, K) of each direction that has its own, in float32 at least."""
        low = F.linear(x, self.gate_down).unflatten(-1, (len(self.gate_up), -1))
        decays = []
        for direction, (up, bias) in enumerate(zip(self.gate_up, self.gate_bias, strict=True)):
            logits = F.linear(low[:, :, direction], up, bias)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            decays.append((F.logsigmoid(logits) / self.normalizer).unflatten(-1, (self.num_heads, -1)))
        return decays


def _expanded(width: int, num_heads: int, key: str, ratio: float) -> int:
    """The width of all heads together, a multiple of their number."""
    expanded = round(width * ratio)
    if expanded == 0 or expanded % num_heads:
        raise FrankensteinError(
            f"model.mixers.gla_attn.{key}={ratio} makes {expanded} channels of hidden_size={width}; "
            f"expected a multiple of num_heads={num_heads}"
        )
    return expanded
