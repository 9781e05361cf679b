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

from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.registry import Registry


@dataclass(frozen=True)
class MixerContext:
    """What the encoder tells every mixer.

    `dropout` is the encoder's rate; the block already applies it to the mixer's output. `max_length` is the row length
    in pretraining; longer rows must work. `rotary` turns (B, T, H, K) by position, or is None. `num_kv_heads` is the
    number of key and value heads of the softmax family (grouped-query attention); None means `num_heads`. `earlier` are
    the layers of the same mixer that the encoder has built before this one, of `num_same` in all: for parameters that
    the layers of one encoder share. `norm` builds the encoder's normalization of a width; `ode_solver` and `ode_steps`
    are those of the encoder's options. `scores` gives the dot products (B, H, T, T) of queries and keys by position in
    place of q k^T (HoPE), or is None; then `rotary` is None.
    """

    hidden_size: int
    num_heads: int
    retention_heads: int
    dropout: float
    causal: bool
    max_length: int
    layer_index: int
    rotary: Callable[[Tensor], Tensor] | None
    num_kv_heads: int | None = None
    earlier: tuple["Mixer", ...] = ()
    num_same: int = 1
    norm: Callable[[int], nn.Module] = RMSNorm
    ode_solver: str = "rk4"
    ode_steps: int = 2
    scores: Callable[[Tensor, Tensor], Tensor] | None = None


class Mixer(nn.Module):
    """Base of all mixers: what the registry and the optimizer groups know about a class.

    `trainable` is False for mixers that only run in evaluation mode; `parameter_group` is the optimizer group of the
    mixer's parameters: attention, retnet, mamba or ode. `positions` are the values of `model.positions` that the mixer
    takes: hope only if it computes with `context.scores`, or knows no positions at all; `takes_use_hope` is True for a
    mixer that `model.use_hope` turns to HoPE. `logical_index` is the place of the running traversal among all
    `num_layers x num_loops`; the encoder sets it before each call. `initialize` runs after the encoder has drawn the
    weights of all linear layers, for what the authors initialize otherwise; `losses` gives the auxiliary losses of the
    last call in training, by name; the encoder adds them up over all traversals.
    """

    Options: ClassVar[type]
    trainable: ClassVar[bool] = True
    parameter_group: ClassVar[str] = "attention"
    positions: ClassVar[tuple[str, ...]] = ("rope", "none")
    takes_use_hope: ClassVar[bool] = False

    def __init__(self, context: MixerContext, options: Any) -> None:
        super().__init__()
        self.logical_index = context.layer_index

    def initialize(self) -> None:
        """Set what the authors initialize in their own way; most mixers have nothing of the kind."""

    @property
    def read_by_others(self) -> bool:
        """Whether other layers use weights of this one."""
        return False

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward pass; most mixers have none."""
        return {}


GPU_ELEMENTS = 1 << 26  # of a temporary: 256 MB in float32, more than fills a GPU


def at_once(x: Tensor, on_cpu: int) -> int:
    """Elements of a temporary on the device of `x`: a CPU's cache holds `on_cpu`; a GPU wants large steps and few."""
    return on_cpu if x.is_cpu else max(on_cpu, GPU_ELEMENTS)


def chunk_on(x: Tensor, asked: int, on_gpu: int) -> int:
    """Tokens of a chunk on the device of `x`: on a GPU, where every chunk costs launches, at least `on_gpu`."""
    return asked if x.is_cpu else max(asked, on_gpu)


MIXERS: Registry[type[Mixer]] = Registry("mixer", "frankenstein.mixers")


class HeadProjections(nn.Module):
    """Queries, keys, values (and gates) of all heads from one `nn.Linear`; queries and keys turned by position.

    Args:
        context: gives the width and the rotation.
        num_heads: H; each head has K = D / H channels.
        count: parts returned: 3 for queries, keys, values; 4 with gates.
        num_kv_heads: G, heads of keys and values; None means H.
    """

    def __init__(self, context: MixerContext, num_heads: int, count: int, num_kv_heads: int | None = None) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        self.heads = (num_heads, groups, groups, *(num_heads,) * (count - 3))
        self.rotary = context.rotary
        self.linear = nn.Linear(context.hidden_size, sum(self.heads) * (context.hidden_size // num_heads), bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), then gates (B, T, H, K)."""
        parts = self.linear(x).unflatten(-1, (sum(self.heads), -1))
        queries, keys = self.heads[:2]
        query_key, *rest = parts.split((queries + keys, *self.heads[2:]), dim=2)
        if self.rotary is not None:
            query_key = self.rotary(query_key)
        return (*query_key.split((queries, keys), dim=2), *rest)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, G, K) to (B, T, H, K): query head h reads group h // (H / G). Unchanged where G = H."""
    groups = x.shape[2]
    return x if groups == num_heads else x.repeat_interleave(num_heads // groups, dim=2)
