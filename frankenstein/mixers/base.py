"""The registry of sequence mixers, what a mixer is given when it is built, and the projections that many share.

A mixer is a `Mixer` in a file of its own, with a nested frozen `Options` dataclass and these rules:

- `Mixer(context, options)` builds it; `mixer(x, mask)` maps (B, T, D) to (B, T, D), before the residual.
- `mask` is (B, T) bool, True for real tokens, which come first in every row; None means that all are real.
- Padding never changes a real token, rows never mix, and without `context.causal` information flows both ways.
- Weights are ordinary `nn.Linear`; the one that writes to the residual stream is called `out`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from frankenstein.registry import Registry


@dataclass(frozen=True)
class MixerContext:
    """What the encoder tells every mixer.

    `dropout` is the encoder's rate; the block already applies it to the mixer's output. `max_length` is the row length
    in pretraining; longer rows must work. `rotary` turns (B, T, H, K) by position, or is None.
    """

    hidden_size: int
    num_heads: int
    retention_heads: int
    dropout: float
    causal: bool
    max_length: int
    layer_index: int
    rotary: Callable[[Tensor], Tensor] | None


class Mixer(nn.Module):
    """Base of all mixers: what the registry and the optimizer groups know about a class.

    `trainable` is False for mixers that only run in evaluation mode; `parameter_group` is the optimizer group of the
    mixer's parameters: attention, retnet, mamba or ode.
    """

    Options: ClassVar[type]
    trainable: ClassVar[bool] = True
    parameter_group: ClassVar[str] = "attention"

    def __init__(self, context: MixerContext, options: Any) -> None:
        super().__init__()


MIXERS: Registry[type[Mixer]] = Registry(
    "mixer",
    "frankenstein.mixers",
    announced=(
        "mamba",
        "ode",
        "titan_attn",
        "sparse_transformer_attn",
        "longformer_attn",
        "bigbird_attn",
        "sparsek_attn",
        "nsa_attn",
        "sparge_attn",
        "fasa_attn",
        "gla_attn",
        "deltanet_attn",
        "gated_deltanet_attn",
        "hgrn2_attn",
        "fox_attn",
        "griffin",
        "mla_attn",
        "kda_attn",
    ),
)


class HeadProjections(nn.Module):
    """Queries, keys, values (and gates) of all heads from one `nn.Linear`; queries and keys turned by position.

    Args:
        context: gives the width and the rotation.
        num_heads: H; each head has K = D / H channels.
        count: parts returned: 3 for queries, keys, values; 4 with gates.
    """

    def __init__(self, context: MixerContext, num_heads: int, count: int) -> None:
        super().__init__()
        self.num_heads, self.count, self.rotary = num_heads, count, context.rotary
        self.linear = nn.Linear(context.hidden_size, count * context.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`count` tensors (B, T, H, K)."""
        heads = self.num_heads
        parts = self.linear(x).unflatten(-1, (self.count * heads, -1))
        query_key, *rest = parts.split((2 * heads, *(heads,) * (self.count - 2)), dim=2)
        if self.rotary is not None:
            query_key = self.rotary(query_key)
        return (*query_key.split(heads, dim=2), *rest)
