"""Sigmoid attention: Ramapuram et al. 2024, https://arxiv.org/abs/2409.04431.

    o_i = sum_j sigmoid(scale q_i . k_j + b) v_j          no normalization of the rows

b = -log n keeps the sum of the n weights near 1 at the start.
Shapes: q, k (B, T, H, K); v (B, T, H, V).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.options import option

Bias = float | Tensor | None


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
    """Attention with independent sigmoid weights.

    Source: Ramapuram et al. 2024, section 2, https://arxiv.org/abs/2409.04431.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        key_padding_mask: (B, T) bool, True for keys that may be attended; the others get weight 0.
        causal: query i sees the keys j <= i only.
        scale: of the dot products; None means K**-0.5.
        bias: number or tensor that broadcasts to (B, H, T, T), added to the logits; None means -log T.
    Returns:  (B, T, H, V).
    """
    length = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = -math.log(length) if bias is None else bias
    # One (B, H, T, T) buffer from logits to weights: it is the largest tensor of the layer.
    weights = (q.transpose(1, 2) * scale) @ k.permute(0, 2, 3, 1)
    weights.add_(bias)
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights.masked_fill_(future, float("-inf"))
    weights.sigmoid_()
    if key_padding_mask is not None:
        v = v.masked_fill(~key_padding_mask[:, :, None, None], 0.0)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


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
