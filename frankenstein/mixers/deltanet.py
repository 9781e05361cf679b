"""DeltaNet: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", https://arxiv.org/abs/2406.06484.

    q, k = norm(act(conv(x W))),   v = silu(conv(x W_v)),   beta = sigmoid(x W_b)
    y = W_o rms_norm(delta_rule(q, k, v, beta))

The operator is in `delta_rule`. Code of the authors: https://github.com/fla-org/flash-linear-attention.
Shapes: q, k (B, T, H, K); v (B, T, H, V); beta (B, T, H).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.delta_chunks import full_precision, wide
from frankenstein.mixers.delta_rule import bidirectional_delta_rule, delta_rule
from frankenstein.mixers.short_conv import ShortConv
from frankenstein.options import option

INIT_STD = 0.02


class DeltaProjections(nn.Module):
    """Queries, keys and values of the delta-rule layers: projection, short convolution, SiLU, norm of queries and keys.

    Args:
        context: gives the width, the heads and the direction.
        key_size, value_size: K and V of a head.
        conv_size: tokens of the short convolution; 0 leaves it out.
        conv_bias: add a bias to the convolution.
        activation: of queries and keys; elu stands for elu + 1.
        norm: of queries and keys: l2, or their sum is 1.
    """

    def __init__(
        self,
        context: MixerContext,
        key_size: int,
        value_size: int,
        conv_size: int,
        conv_bias: bool,
        activation: str = "silu",
        norm: str = "l2",
    ) -> None:
        super().__init__()
        heads = context.num_heads
        self.num_heads, self.widths = heads, (2 * heads * key_size, heads * value_size)
        self.activation, self.norm = activation, norm
        self.linear = nn.Linear(context.hidden_size, sum(self.widths), bias=False)
        self.conv = ShortConv(sum(self.widths), conv_size, causal=context.causal, bias=conv_bias) if conv_size else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) to q, k (B, T, H, K) and v (B, T, H, V)."""
        x = wide(self.linear(x))
        with full_precision(x):  # rounding of short keys would be a rounding of their direction
            x = x if self.conv is None else self.conv(x, mask)
            qk, v = x.split(self.widths, -1)
            qk = _ACTIVATIONS[self.activation](qk).unflatten(-1, (2 * self.num_heads, -1))
            q, k = _NORMS[self.norm](qk).chunk(2, dim=2)
            return q, k, F.silu(v).unflatten(-1, (self.num_heads, -1))


def l2_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; 0 stays 0."""
    return x * ((x * x).sum(-1, keepdim=True) + 1e-6).rsqrt()


def sum_norm(x: Tensor) -> Tensor:
    """x / sum x over the last dimension, for x >= 0; 0 stays 0."""
    return x / x.sum(-1, keepdim=True).clamp_min(1e-6)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}
_NORMS = {"l2": l2_norm, "sum": sum_norm}


def draw_weights(layer: nn.Module) -> None:
    """Weights of the linear layers as the authors draw them; an encoder draws its own."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def count_directions(context: MixerContext, separate: bool, name: str) -> int:
    """2 where the reverse direction has gates of its own, else 1."""
    if separate and context.causal:
        raise FrankensteinError(
            f"model.mixers.{name}.separate_directions needs model.causal: false, for there is one direction"
        )
    return 2 if separate else 1


def head_size(context: MixerContext, ratio: float, key: str) -> int:
    """Channels of one head where all heads have ratio x D; `key` is what the error calls the ratio."""
    size = context.hidden_size * ratio / context.num_heads
    if size < 1 or size != int(size):
        raise FrankensteinError(
            f"{key}={ratio} gives heads of {size:g} channels "
            f"(hidden_size={context.hidden_size}, num_heads={context.num_heads}); expected a whole number"
        )
    return int(size)


def gate_weight(rows: int, width: int) -> nn.Parameter:
    """Weight (rows, width) of a small gate, which stays in full precision when the layer turns ternary."""
    return nn.Parameter(torch.empty(rows, width).normal_(std=INIT_STD))


def gate_inputs(x: Tensor, *weights: Tensor) -> Tensor:
    """x through the weights, one after the other, in full precision: errors of decays add up over time."""
    with full_precision(x):
        x = wide(x)
        for weight in weights:
            x = F.linear(x, weight)
        return x


@MIXERS.register("deltanet_attn")
class DeltaNet(Mixer):
    """DeltaNet with short convolutions, normalized queries and keys, and per-head output norm.

    Source: Yang et al. 2024, https://arxiv.org/abs/2406.06484; the options are those of the authors' code.
    In an encoder the convolution is centred and the delta rule runs in both directions.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the recurrence tells them; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `deltanet_attn`."""

        expand_k: float = option(1.0, "Width of all keys, as a ratio of the hidden size.", exclusiveMinimum=0)
        expand_v: float = option(1.0, "Width of all values, as a ratio of the hidden size.", exclusiveMinimum=0)
        conv_size: int = option(4, "Tokens that the short convolution sees to each side; 0 leaves it out.", minimum=0)
        conv_bias: bool = option(False, "Add a bias to the short convolution.")
        qk_activation: str = option(
            "silu", "Activation of queries and keys; elu stands for elu + 1.", enum=list(_ACTIVATIONS)
        )
        qk_norm: str = option(
            "l2", "Norm of queries and keys; sum needs the activation elu or relu.", enum=list(_NORMS)
        )
        use_beta: bool = option(True, "Learn the writing strength; otherwise it is 1.")
        use_gate: bool = option(False, "Gate the output with a swish of the input.")
        allow_neg_eigval: bool = option(False, "Writing strength up to 2, for negative eigenvalues of the transition.")
        separate_directions: bool = option(False, "A writing strength of its own for the reverse direction.")
        chunk_size: int = option(
            32,
            "Tokens that are computed densely at once, on a GPU 64 or more; any length takes linear time.",
            minimum=1,
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        if options.qk_norm == "sum" and options.qk_activation not in ("elu", "relu"):
            raise FrankensteinError(
                f"model.mixers.deltanet_attn.qk_norm='sum' needs qk_activation elu or relu, "
                f"whose sums are not negative; found {options.qk_activation!r}"
            )
        if options.separate_directions and not options.use_beta:
            raise FrankensteinError(
                "model.mixers.deltanet_attn.separate_directions needs use_beta: nothing else differs by direction"
            )
        key_size = head_size(context, options.expand_k, "model.mixers.deltanet_attn.expand_k")
        value_size = head_size(context, options.expand_v, "model.mixers.deltanet_attn.expand_v")
        self.options, self.causal = options, context.causal
        conv, act = (options.conv_size, options.conv_bias), (options.qk_activation, options.qk_norm)
        self.project = DeltaProjections(context, key_size, value_size, *conv, *act)
        directions = count_directions(context, options.separate_directions, "deltanet_attn")
        width = context.num_heads * value_size
        self.beta = gate_weight(directions * context.num_heads, context.hidden_size) if options.use_beta else None
        self.gate = nn.Linear(context.hidden_size, width, bias=False) if options.use_gate else None
        self.norm = RMSNorm(value_size, eps=1e-5)
        self.out = nn.Linear(width, context.hidden_size, bias=False)
        draw_weights(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x, mask)
        beta, *reverse = self._betas(x, q)
        size = self.options.chunk_size
        if self.causal:  # padding comes last, so that no real token sees it
            o, _ = delta_rule(q, k, v, beta, chunk_size=size)
        else:
            beta_rev = reverse[0] if reverse else None
            o = bidirectional_delta_rule(q, k, v, beta, beta_rev=beta_rev, mask=mask, chunk_size=size)
        o = self.norm(o).flatten(2)
        return self.out(o if self.gate is None else o * F.silu(self.gate(x)))

    def _betas(self, x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        """(B, T, H), one for each direction that has its own."""
        if self.beta is None:
            return (q.new_ones(q.shape[:-1]),)
        beta = gate_inputs(x, self.beta).sigmoid() * (2 if self.options.allow_neg_eigval else 1)
        return beta.split(q.shape[2], -1)
