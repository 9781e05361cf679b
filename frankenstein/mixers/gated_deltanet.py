"""Gated DeltaNet: Yang et al. 2024, https://arxiv.org/abs/2412.06464.

    g = -exp(A) softplus(x W_a + b),   beta = sigmoid(x W_b)
    q, k = l2_norm(silu(conv(x W))),   v = silu(conv(x W_v))
    y = W_o (rms_norm(gated_delta_rule(q, k, v, g, beta)) * silu(x W_g))

The operator is in `delta_rule`. Code of the authors: https://github.com/fla-org/flash-linear-attention.
Shapes: q, k (B, T, H, K); v (B, T, H, V); g, beta (B, T, H).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.delta_rule import bidirectional_gated_delta_rule, gated_delta_rule
from frankenstein.mixers.deltanet import DeltaProjections, count_directions, draw_weights, gate_inputs, gate_weight
from frankenstein.options import option


def decay_scale(*shape: int, low: float = 0.0) -> nn.Parameter:
    """A of the decay: the log of a uniform draw between `low` and 16, as in Mamba 2."""
    return nn.Parameter(torch.empty(shape).uniform_(low, 16).clamp_min_(1e-4).log())


def decay_bias(*shape: int) -> nn.Parameter:
    """The bias of the decay: its softplus is log-uniform between 0.001 and 0.1, as in Mamba 2."""
    dt = (torch.rand(shape) * math.log(100) + math.log(0.001)).exp()
    return nn.Parameter(dt + (-torch.expm1(-dt)).log())  # the inverse of softplus


@MIXERS.register("gated_deltanet_attn")
class GatedDeltaNet(Mixer):
    """Gated DeltaNet with short convolutions, the decay of Mamba 2 and a swish-gated output norm.

    Source: Yang et al. 2024, https://arxiv.org/abs/2412.06464; the options are those of the
    authors' code. In an encoder the convolution is centred and the delta rule runs in both directions.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the recurrence tells them; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `gated_deltanet_attn`."""

        head_dim: int | None = option(
            None, "Key channels of a head; null takes 3/4 of hidden size / heads, the authors' share.", minimum=1
        )
        expand_v: float = option(2.0, "Value channels of a head, as a ratio of its key channels.", exclusiveMinimum=0)
        conv_size: int = option(4, "Tokens that the short convolution sees to each side; 0 leaves it out.", minimum=0)
        conv_bias: bool = option(False, "Add a bias to the short convolution.")
        use_gate: bool = option(True, "Gate the output with a swish of the input.")
        allow_neg_eigval: bool = option(False, "Writing strength up to 2, for negative eigenvalues of the transition.")
        separate_directions: bool = option(False, "Decay and writing strength of their own for the reverse direction.")
        chunk_size: int = option(
            32,
            "Tokens that are computed densely at once, on a GPU 64 or more; any length takes linear time.",
            minimum=1,
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        heads, hidden = context.num_heads, context.hidden_size
        key_size = options.head_dim or max(1, 3 * hidden // (4 * heads))
        value_size = value_channels(key_size, options.expand_v, "model.mixers.gated_deltanet_attn.expand_v")
        self.options, self.causal, self.num_heads = options, context.causal, heads
        self.project = DeltaProjections(context, key_size, value_size, options.conv_size, options.conv_bias)
        directions = count_directions(context, options.separate_directions, "gated_deltanet_attn")
        self.gates = gate_weight(directions * 2 * heads, hidden)
        self.A_log, self.dt_bias = decay_scale(directions, heads), decay_bias(directions, heads)
        self.gate = nn.Linear(hidden, heads * value_size, bias=False) if options.use_gate else None
        self.norm = RMSNorm(value_size, eps=1e-5)
        self.out = nn.Linear(heads * value_size, hidden, bias=False)
        draw_weights(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x, mask)
        g, beta = self._gates(x)
        size = self.options.chunk_size
        if self.causal:  # padding comes last, so that no real token sees it
            o, _ = gated_delta_rule(q, k, v, g[0], beta[0], chunk_size=size)
        else:
            o = bidirectional_gated_delta_rule(
                q, k, v, g[0], beta[0], g_rev=g[-1], beta_rev=beta[-1], mask=mask, chunk_size=size
            )
        o = self.norm(o).flatten(2)
        return self.out(o if self.gate is None else o * F.silu(self.gate(x)))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays and writing strengths of the directions, (1 or 2, B, T, H) each."""
        a, b = gate_inputs(x, self.gates).unflatten(-1, (-1, 2, self.num_heads)).movedim(2, 0).unbind(3)
        g = -self.A_log.exp()[:, None, None] * F.softplus(a + self.dt_bias[:, None, None])
        return g, b.sigmoid() * (2 if self.options.allow_neg_eigval else 1)


def value_channels(key_size: int, ratio: float, key: str) -> int:
    """Value channels of a head with `key_size` key channels; `key` is what the error calls the ratio."""
    size = key_size * ratio
    if size < 1 or size != int(size):
        raise FrankensteinError(
            f"{key}={ratio} gives {size:g} value channels for {key_size} key channels; expected a whole number"
        )
    return int(size)
