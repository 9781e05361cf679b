"""Titans, memory as a gate: Behrouz et al. 2025, section 4.2, https://arxiv.org/abs/2501.00663.

    x' = [p_1 .. p_n] || x                              persistent tokens, learned (their eq. 26)
    y = SW-Attn*(x')                                    softmax attention in a sliding window; all see p (eq. 27)
    o = norm(y) * 2 sigmoid(norm(M(x')))                M(x'): what the memory answers to the queries (eq. 28)
    out = W_out (o * silu(W_gate x))                    the output gate of their section 4.4

Shapes: q, k (B, T, H, K); v (B, T, H, V); the memory is that of titans_memory.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.block_sparse import FLOOR, band, masked_softmax, merged_attention
from frankenstein.mixers.delta_chunks import full_precision, wide
from frankenstein.mixers.deltanet import DeltaProjections
from frankenstein.mixers.standard_attn import Scores, softmax_attention
from frankenstein.mixers.titans_memory import bidirectional_titans_memory, titans_memory
from frankenstein.options import option

FORGETTING = (0.001, 0.1)  # alpha of the first and the last head at the start: horizons of 1000 to 10 tokens


def prefix_window_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention with a (T, T) mask. Arguments as `prefix_window_attention`."""
    allowed = _seen(q, window, num_prefix, causal)
    if causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    return masked_softmax(q, k, v, allowed)


def prefix_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
    scores: Scores = None,
) -> Tensor:
    """Sliding-window softmax attention in which all tokens also see the first ones: linear in T without `scores`.

    Source: Behrouz et al. 2025, figure 3b, https://arxiv.org/abs/2501.00663.
    Args:
        q, k: (B, T, H, K), with the prefix.
        v: (B, T, H, V).
        window: what a query sees: the last `window` tokens with itself, or, both ways, those at most window // 2 away.
        num_prefix: first tokens, which every query sees.
        mask: (B, T) bool, True for real tokens, which come first.
        causal: query i sees the keys j <= i only.
        scores: as in `softmax_attention`; takes memory (T, T).
    Returns:  (B, T - num_prefix, H, V), for the queries after the prefix; without meaning for padded queries.
    """
    length, reach = q.shape[1], window - 1 if causal else window // 2
    narrow = reach < length - num_prefix - 1
    if narrow and scores is None:
        pieces = band(q, length, reach, first=num_prefix, mask=mask, causal=causal)
        return merged_attention(q[:, num_prefix:], k, v, pieces)
    if scores is None and not causal:
        return softmax_attention(q[:, num_prefix:], k, v, key_padding_mask=mask)
    dots = scores
    if narrow and scores is not None:
        unseen = ~_seen(q, window, num_prefix, causal)

        def dots(q: Tensor, k: Tensor) -> Tensor:
            return scores(q, k).masked_fill(unseen, FLOOR)

    return softmax_attention(q, k, v, key_padding_mask=mask, causal=causal, scores=dots)[:, num_prefix:]


def _seen(q: Tensor, window: int, num_prefix: int, causal: bool) -> Tensor:
    """(T, T) bool: what is in the window or the prefix, later tokens included."""
    steps = torch.arange(q.shape[1], device=q.device)
    distance = (steps[:, None] - steps).abs()
    return (distance < window if causal else distance <= window // 2) | (steps < num_prefix)


@MIXERS.register("titan_attn")
class TitansMemoryAsGate(Mixer):
    """Softmax attention gated by a memory that learns while it reads.

    Source: Behrouz et al. 2025, sections 3, 4.2 and 4.4, https://arxiv.org/abs/2501.00663. Ours: the memory is linear,
    with a state per head, and reads both ways in an encoder; the gate is twice a sigmoid, so that an empty memory
    leaves attention as it is; theta = sigmoid (1 - eta) / (2 chunk size), so that under a steady momentum a key is
    corrected by at most its whole error, however often it stands in a chunk: rates twice as large diverged in trials.
    Seed 002 eq. 31 has no error to learn from and is not Titans.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")
    takes_use_hope: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """Options of `titan_attn`."""

        window: int | None = option(
            1024,
            "Tokens that attention sees around a token (before it, if causal); null means the whole row.",
            minimum=1,
        )
        num_persistent: int = option(4, "Learned tokens before every row, which all tokens see.", minimum=0)
        memory_chunk_size: int = option(
            1,
            "Tokens whose memory gradients are taken at the same memory, with rates that much smaller; 1 learns from "
            "every token in turn.",
            minimum=1,
        )
        conv_size: int = option(
            4, "Short convolution of the memory's queries, keys and values, in tokens; 0: none.", minimum=0
        )
        output_gate: bool = option(True, "Gate the output by a linear layer before the last projection.")

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width, heads = context.hidden_size, context.num_heads
        self.causal, self.num_heads, self.scores = context.causal, heads, context.scores
        self.window, self.chunk_size = options.window, options.memory_chunk_size
        self.persistent = nn.Parameter(0.02 * torch.randn(options.num_persistent, width))
        self.project = HeadProjections(context, heads, 3, context.num_kv_heads)
        self.memory_project = DeltaProjections(context, width // heads, width // heads, options.conv_size, False)
        self.rates = nn.Parameter(0.02 * torch.randn(3 * heads, width))
        alpha = torch.logspace(math.log10(FORGETTING[0]), math.log10(FORGETTING[1]), heads)
        self.rates_bias = nn.Parameter(torch.cat([torch.zeros(2 * heads), alpha.logit()]))
        self.attention_norm, self.memory_norm = (RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.gate = nn.Linear(width, width, bias=False) if options.output_gate else None
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        prefix = len(self.persistent)
        longer = torch.cat([self.persistent.expand(len(x), -1, -1).to(x.dtype), x], 1)
        real = None if mask is None else F.pad(mask, (prefix, 0), value=True)
        memory = self._remember(longer, real)[:, prefix:]
        attended = self._attend(longer, real).to(memory.dtype)
        y = (self.attention_norm(attended) * (2 * self.memory_norm(memory).sigmoid())).flatten(2)
        return self.out(y if self.gate is None else y * F.silu(self.gate(x)))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, K), for the tokens after the persistent ones."""
        q, k, v = self.project(x)
        return prefix_window_attention(
            q,
            repeat_heads(k, self.num_heads),
            repeat_heads(v, self.num_heads),
            window=2 * x.shape[1] if self.window is None else self.window,
            num_prefix=len(self.persistent),
            mask=mask,
            causal=self.causal,
            scores=self.scores,
        )

    def _remember(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, K): the memory's answers, in float32 or wider, for the errors it learns from feed back."""
        q, k, v = self.memory_project(x, mask)
        with full_precision(x):
            part, eta, alpha = F.linear(wide(x), self.rates, self.rates_bias).sigmoid().chunk(3, -1)
            rates = (part * (1 - eta) / (2 * self.chunk_size), alpha, eta)
            if self.causal:  # padding comes last, so that no real token sees it
                return titans_memory(q, k, v, *rates, chunk_size=self.chunk_size)[0]
            return bidirectional_titans_memory(q, k, v, *rates, mask=mask, chunk_size=self.chunk_size)
