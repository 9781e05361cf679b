"""HGRN2, gated linear recurrence with state expansion: Qin et al. 2024, https://arxiv.org/abs/2404.07904.

    a_t = lb + (1 - lb) sigmoid(f_t),   S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T,   o_t = scale S_t^T silu(q_t)

The forget gate is tied to the key: gated linear attention with g = log a, k = 1 - a. The lower bound lb of the gates
grows with the layer: low layers forget fast, high ones remember long (section 3 of HGRN, Qin et al. 2023,
https://arxiv.org/abs/2311.04823). Seed 001 writes an independent key and a scalar bound; here stands the paper's.
An encoder reads both ways: y = f(x) + flip(f(flip x)) - f1(x), see gla.py.
Shapes: q, f (B, T, H, K); v (B, T, H, V); lower bound (H, K), in [0, 1); state S (B, H, K, V).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.chunked_gla import gla_chunked
from frankenstein.mixers.gla import gla
from frankenstein.mixers.short_conv import ShortConv
from frankenstein.options import option


def hgrn2_lower_bounds(param: Tensor) -> Tensor:
    """Lower bounds of the forget gates of all layers, from 0 for the first, growing with depth.

        p = softmax(param) over the layers,   lb_l = p_1 + .. + p_l
    Source: Qin et al. 2023, section 3, https://arxiv.org/abs/2311.04823.
    Args:
        param: (L, D), one row a layer.
    Returns:  (L, D).
    """
    p = param.softmax(0)
    return torch.cat((torch.zeros_like(p[:1]), p[1:].cumsum(0)))


def hgrn2_recurrent(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    *,
    lower_bound: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `hgrn2`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bound = 0.0 if lower_bound is None else lower_bound
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        a = (bound + (1 - bound) * f[:, t].sigmoid()).unsqueeze(-1)
        state = a * state + (1 - a) * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", F.silu(q[:, t]), state))
    return torch.stack(outputs, 1), state if output_final_state else None


def hgrn2(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    *,
    lower_bound: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Causal HGRN2, dense inside chunks and recurrent between them: linear in T.

    Source: Qin et al. 2024, section 3, https://arxiv.org/abs/2404.07904, as gated linear attention, as they do.
    Args:
        q: (B, T, H, K), before the SiLU.
        f: (B, T, H, K), logits of the forget gates.
        v: (B, T, H, V).
        lower_bound: (H, K), in [0, 1); None means 0.
        The others as `gla`.
    Returns:  output (B, T, H, V), final state (B, H, K, V) or None.
    """
    k, g = _key_and_log_decay(f, lower_bound)
    return gla(
        F.silu(q),
        k,
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
    )


def bidirectional_hgrn2_recurrent(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    *,
    lower_bound: Tensor | None = None,
    f_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The rule of the module docstring, row by row from the recurrence. Arguments as `bidirectional_hgrn2`."""
    f_rev = f if f_rev is None else f_rev
    lengths = [q.shape[1]] * len(q) if mask is None else mask.sum(1).tolist()
    o = torch.zeros_like(v)
    for row, length in enumerate(lengths):
        q1, f1, v1, r1 = (x[row : row + 1, :length] for x in (q, f, v, f_rev))
        forward, _ = hgrn2_recurrent(q1, f1, v1, lower_bound=lower_bound, scale=scale)
        flipped = (x.flip(1) for x in (q1, r1, v1))
        backward, _ = hgrn2_recurrent(*flipped, lower_bound=lower_bound, scale=scale)
        single = (x.transpose(0, 1) for x in (q1, f1, v1))
        alone, _ = hgrn2_recurrent(*single, lower_bound=lower_bound, scale=scale)
        o[row, :length] = (forward + backward.flip(1) - alone.transpose(0, 1))[0]
    return o


def bidirectional_hgrn2(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    *,
    lower_bound: Tensor | None = None,
    f_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """HGRN2 in both directions, dense inside chunks and recurrent between them: linear in T.

    Args:
        f_rev: (B, T, H, K), logits of the forget gates, and so the keys, of the direction from right to left; None
            means f.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `hgrn2`.
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, g = _key_and_log_decay(f, lower_bound)
    reverse = None if f_rev is None else _key_and_log_decay(f_rev, lower_bound)
    padded = None if mask is None else ~mask[:, :, None, None]
    if padded is not None:
        k, g, v = (x.masked_fill(padded, 0.0) for x in (k, g, v))
        reverse = reverse and (reverse[0].masked_fill(padded, 0.0), reverse[1].masked_fill(padded, 0.0))
    o, _ = gla_chunked(F.silu(q), k, v, g, scale=scale, chunk_size=chunk_size, reverse=reverse, both_ways=True)
    return o if padded is None else o.masked_fill(padded, 0.0)


def _key_and_log_decay(f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 - a and log a of the gates a, each without cancellation, in float32 at least."""
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    if lower_bound is None:
        return torch.sigmoid(-f), F.logsigmoid(f)
    a = lower_bound + (1 - lower_bound) * torch.sigmoid(f)
    # a bound of 0 and a gate that underflows: log 0 would leave no finite gradient
    return (1 - lower_bound) * torch.sigmoid(-f), a.clamp_min(torch.finfo(a.dtype).tiny).log()


@MIXERS.register("hgrn2_attn")
class HGRN2(Mixer):
    """HGRN2 layer: queries, forget gates and values, full-width norm, output projection.

    Source: Qin et al. 2024, section 3, https://arxiv.org/abs/2404.07904; the norm and the optional short convolution
    follow https://github.com/fla-org/flash-linear-attention. The query is the output gate; there is no other. The first
    HGRN2 layer of an encoder owns the bounds of all of them; an encoder with only one has bound 0 and no parameter.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the decays tell positions; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `hgrn2_attn`."""

        expand_ratio: int | None = option(
            None, "State width of each head; null takes the width of its values, hidden_size / num_heads.", minimum=1
        )
        separate_gates: bool = option(
            False, "Give each direction of an encoder forget gates, and so keys, of its own: one more projection."
        )
        conv_size: int = option(
            0, "Tokens that a short convolution of queries, gates and values covers one way; 0 has none.", minimum=0
        )
        chunk_size: int = option(
            64, "Tokens that are computed densely at once, at most; on a GPU 128 or more.", enum=[16, 32, 64, 128, 256]
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width, self.num_heads, self.causal = context.hidden_size, context.num_heads, context.causal
        state_width = self.num_heads * (options.expand_ratio or width // self.num_heads)
        self.chunk_size, self.layer = options.chunk_size, len(context.earlier)
        self.widths = [width, state_width, state_width]  # values, queries, forget gates per direction
        if options.separate_gates and not self.causal:
            self.widths.append(state_width)
        self.project = nn.Linear(width, sum(self.widths), bias=False)
        conv_size = options.conv_size
        self.conv = ShortConv(sum(self.widths), conv_size, causal=self.causal) if conv_size else None
        self.norm = RMSNorm(width, eps=1e-5)
        self.out = nn.Linear(width, width, bias=False)
        owner = self.layer == 0 and context.num_same > 1
        self.bounds = nn.Parameter(torch.zeros(context.num_same, state_width)) if owner else None
        self.first = context.earlier[:1]  # in a tuple, so that the layer that owns the bounds is registered once

    @property
    def read_by_others(self) -> bool:
        """The first layer's bounds are those of all."""
        return self.bounds is not None

    def lower_bound(self) -> Tensor | None:
        """(H, K); None for the first layer, whose bound is 0 whatever the parameter says."""
        if not self.first:
            return None
        (first,) = self.first
        assert isinstance(first, HGRN2) and first.bounds is not None
        return hgrn2_lower_bounds(first.bounds)[self.layer].view(self.num_heads, -1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        mixed = self.project(x)
        if self.conv is not None:
            mixed = self.conv(mixed, mask)
        v, q, f, *f_rev = (part.unflatten(-1, (self.num_heads, -1)) for part in mixed.split(self.widths, -1))
        bound = self.lower_bound()
        if self.causal:  # padding comes last, so that no real token sees it
            o, _ = hgrn2(q, f, v, lower_bound=bound, chunk_size=self.chunk_size)
        else:
            reverse = f_rev[0] if f_rev else None
            o = bidirectional_hgrn2(q, f, v, lower_bound=bound, f_rev=reverse, mask=mask, chunk_size=self.chunk_size)
        return self.out(self.norm(o.flatten(2).to(self.norm.weight.dtype)))
