"""Gated softmax attention: Qiu et al. 2025, https://arxiv.org/abs/2505.06708.

    o_i = (sum_j softmax_j(scale q_i . k_j) v_j) * sigmoid(gate_i),    gate = X W_g

The gate is elementwise and per head, after attention and before the output projection (their position G1).
Shapes: q, k (B, T, H, K); v, gate (B, T, H, V).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.standard_attn import Scores, softmax_attention, softmax_dense


def gated_softmax_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The equation above, written out. Arguments as `gated_softmax_attention`."""
    o = softmax_dense(q, k, v, key_padding_mask=key_padding_mask, causal=causal, scale=scale)
    return o * gate.sigmoid()


def gated_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    scores: Scores = None,
) -> Tensor:
    """Softmax attention whose output passes an elementwise sigmoid gate.

    Source: Qiu et al. 2025, gate position G1, https://arxiv.org/abs/2505.06708.
    Args:
        gate: (B, T, H, V), before the sigmoid; the others as `softmax_attention`.
    Returns:  (B, T, H, V).
    """
    o = softmax_attention(q, k, v, key_padding_mask=key_padding_mask, causal=causal, scale=scale, scores=scores)
    return o * gate.sigmoid()


@MIXERS.register("gated_softmax_attn")
class GatedSoftmaxAttention(Mixer):
    """Multi-head softmax attention with a sigmoid gate on every head's output.

    Source: Qiu et al. 2025, gate position G1, elementwise and per head, https://arxiv.org/abs/2505.06708.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")

    @dataclass(frozen=True)
    class Options:
        """Gated softmax attention has no options of its own."""

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        self.causal, self.num_heads, self.scores = context.causal, context.num_heads, context.scores
        self.project = HeadProjections(context, context.num_heads, 4, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v, gate = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        o = gated_softmax_attention(q, k, v, gate, key_padding_mask=mask, causal=self.causal, scores=self.scores)
        return self.out(o.flatten(2))
