"""Forgetting attention: Lin et al. 2025, "Forgetting Transformer", https://arxiv.org/abs/2503.02130.

    o_i = sum_j softmax_j(scale q_i . k_j + D_ij) v_j,    D_ij = g_(j+1) + .. + g_i = c_i - c_j,    c = cumsum(g)

One direction sees j <= i (their eq. 4-5). An encoder sees every j in one softmax, and both directions count the gates
from the query (inclusive) to the key (exclusive): D_ij = g_i + .. + g_(j-1) = e_j - e_i for j > i, e = cumsum(g) - g.
Shapes: q, k (B, T, H, K); v (B, T, H, V); g (B, T, H), log of the forget gate, <= 0.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import rms_norm
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.decay_softmax import DecaySoftmax
from frankenstein.mixers.gpu_kernels import decayed_attention, flex, half_precision
from frankenstein.options import option

SHORT = 256  # tokens up to which all pairs at once are faster than tiles


def forgetting_attn_dense(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, window_size: int | None = None
) -> Tensor:
    """The equation above, written out. Arguments as `forgetting_attn`."""
    c = g.cumsum(1).transpose(1, 2)
    steps = torch.arange(q.shape[1], device=q.device)
    distance = steps[:, None] - steps
    hidden = distance < 0
    if window_size is not None:
        hidden = hidden | (distance >= window_size)
    return _dense(q, k, v, (c[..., :, None] - c[..., None, :]).masked_fill(hidden, float("-inf")), scale)


def bidirectional_forgetting_attn_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    g_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The equation above, written out. Arguments as `bidirectional_forgetting_attn`."""
    g_rev = g if g_rev is None else g_rev
    c, e = g.cumsum(1).transpose(1, 2), (g_rev.cumsum(1) - g_rev).transpose(1, 2)
    past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    decay = torch.where(past, c[..., :, None] - c[..., None, :], e[..., None, :] - e[..., :, None])
    if mask is None:
        return _dense(q, k, v, decay, scale)
    o = _dense(q, k, v, decay.masked_fill(~mask[:, None, None, :], float("-inf")), scale)
    return o.masked_fill(~mask[:, :, None, None], 0.0)


def _dense(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = ((q.transpose(1, 2) * scale) @ k.permute(0, 2, 3, 1)).add_(decay)
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def forgetting_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, window_size: int | None = None
) -> Tensor:
    """Causal softmax attention with a forget gate, in linear memory; heads that forget fast take linear time.

    Source: Lin et al. 2025, eq. 5, https://arxiv.org/abs/2503.02130.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        g: (B, T, H), log of the forget gate, <= 0; 0 keeps everything and gives softmax attention.
        scale: of the dot products; None means K**-0.5.
        window_size: query i sees the keys i - window_size + 1 .. i only; None means all up to i.
    Returns:  (B, T, H, V).
    """
    if half_precision(q) and flex(q):
        c = g.double().cumsum(1)
        return decayed_attention(q, k, v, c, None, window=window_size, scale=scale)
    with torch.autocast(q.device.type, enabled=False):
        dtype, (q, k, v, g) = q.dtype, _widen(q, k, v, g)
        if q.shape[1] <= SHORT:
            return forgetting_attn_dense(q, k, v, g, scale=scale, window_size=window_size).to(dtype)
        return _tiled(q, k, v, (g.double().cumsum(1), None), None, scale, window_size).to(dtype)


def bidirectional_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    g_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over both directions with a forget gate, in linear memory.

    Source: the bias of Lin et al. 2025, eq. 5, https://arxiv.org/abs/2503.02130, mirrored for the keys after the query;
    the paper itself is causal.
    Args:
        g_rev: (B, T, H), gates towards the keys after the query, in the order of time; None shares g.
        mask: (B, T) bool, True for real tokens, which come first; padded keys get no weight, padded rows come out as 0.
        The others as `forgetting_attn`.
    Returns:  (B, T, H, V).
    """
    g_rev = g if g_rev is None else g_rev
    if half_precision(q) and flex(q):
        back = g_rev.double()
        return decayed_attention(q, k, v, g.double().cumsum(1), back.cumsum(1) - back, mask=mask, scale=scale)
    with torch.autocast(q.device.type, enabled=False):
        dtype, (q, k, v, g, g_rev) = q.dtype, _widen(q, k, v, g, g_rev)
        if q.shape[1] <= SHORT:
            return bidirectional_forgetting_attn_dense(q, k, v, g, g_rev=g_rev, mask=mask, scale=scale).to(dtype)
        back = g_rev.double()
        return _tiled(q, k, v, (g.double().cumsum(1), back.cumsum(1) - back), mask, scale, None).to(dtype)


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Narrow floats as float32, in which the logits need their digits; float64 stays."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: tuple[Tensor, Tensor | None],
    mask: Tensor | None,
    scale: float | None,
    window_size: int | None,
) -> Tensor:
    """`DecaySoftmax` with the heads in the batch; sums are c and e, (B, T, H)."""
    batch, length, heads = q.shape[:3]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = (x.transpose(1, 2).reshape(batch * heads, length, -1) for x in (q, k, v))
    c, e = (None if x is None else x.transpose(1, 2).reshape(batch * heads, length) for x in sums)
    real = None if mask is None else mask.repeat_interleave(heads, 0)
    o = DecaySoftmax.apply(*rows, c, e, real, scale, window_size)
    return o.unflatten(0, (batch, heads)).transpose(1, 2)


class HeadGate(nn.Module):
    """Logits of one gate per head: (B, T, D) to (B, T, H), in full precision; initialized as the authors do."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(heads)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class HeadNorm(nn.Module):
    """RMSNorm of every head of (B, T, H, K), with a scale per head and channel."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x) * self.weight.to(x.dtype)


@MIXERS.register("fox_attn")
class ForgettingAttention(Mixer):
    """Multi-head forgetting attention.

    Source: Lin et al. 2025, sections 3 and 4, https://arxiv.org/abs/2503.02130; code
    https://github.com/zhixuan-lin/forgetting-transformer. The decay carries the positions, so that the rotation of the
    encoder is off by default, as theirs. The default is their plain block; qk_norm, kv_shift, output_norm and
    output_gate together make their "Pro" block. In an encoder the shift mixes in both neighbours.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the decay tells them; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `fox_attn`."""

        reverse_gate: bool = option(False, "A forget gate of its own towards later tokens; causal models have none.")
        rotary: bool = option(False, "Also turn queries and keys by the encoder's rotary positions.")
        qk_norm: bool = option(False, "RMSNorm of each head's queries and keys.")
        kv_shift: bool = option(False, "Mix neighbouring tokens into keys and values, by a gate per token and head.")
        output_norm: bool = option(False, "RMSNorm of each head's output.")
        output_gate: bool = option(False, "Sigmoid gate per channel on the output.")
        window_size: int | None = option(
            None, "Tokens that a causal query sees, itself included; null means all.", minimum=1
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width, heads = context.hidden_size, context.num_heads
        groups = heads if context.num_kv_heads is None else context.num_kv_heads
        self.causal, self.num_heads, self.window_size = context.causal, heads, options.window_size
        if options.window_size is not None and not context.causal:
            raise FrankensteinError(
                f"model.mixers.fox_attn.window_size={options.window_size} needs model.causal: true; "
                "both directions allow null only"
            )
        if options.rotary and context.rotary is None:
            raise FrankensteinError("model.mixers.fox_attn.rotary=true needs model.positions: rope")
        self.rotary = context.rotary if options.rotary else None
        unturned = replace(context, rotary=None)  # the rotation comes after the shift and the norm
        self.project = HeadProjections(unturned, heads, 3 + options.output_gate, context.num_kv_heads)
        self.out = nn.Linear(width, width, bias=False)
        # Gates stay in full precision when the linear layers turn ternary: they are parameters, not layers.
        reverse = options.reverse_gate and not context.causal
        self.gate, self.gate_reverse = HeadGate(width, heads), HeadGate(width, heads) if reverse else None
        self.shift_k, self.shift_v = (
            HeadGate(width, groups, bias=False) if options.kv_shift else None for _ in range(2)
        )
        norms = ((options.qk_norm, heads), (options.qk_norm, groups), (options.output_norm, heads))
        self.norm_q, self.norm_k, self.norm_o = (HeadNorm(n, width // heads) if on else None for on, n in norms)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v, *gate = self.project(x)
        if self.shift_k is not None and self.shift_v is not None:
            k, v = self._shift(k, self.shift_k(x), mask), self._shift(v, self.shift_v(x), mask)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        g = F.logsigmoid(self.gate(x))
        if self.causal:  # padding comes last, so that no real token sees it
            o = forgetting_attn(q, k, v, g, window_size=self.window_size)
        else:
            g_rev = None if self.gate_reverse is None else F.logsigmoid(self.gate_reverse(x))
            o = bidirectional_forgetting_attn(q, k, v, g, g_rev=g_rev, mask=mask)
        if self.norm_o is not None:
            o = self.norm_o(o)
        if gate:
            o = o * gate[0].sigmoid()
        return self.out(o.flatten(2))

    def _shift(self, x: Tensor, logit: Tensor, mask: Tensor | None) -> Tensor:
        """(1 - a) x_t + a x_(t-1) one way, with the mean of both neighbours in the other's place both ways."""
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None, None], 0.0)
        a = logit.sigmoid()[..., None]
        near = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
        if not self.causal:
            near = (near + F.pad(x, (0, 0, 0, 0, 0, 1))[:, 1:]) / 2
        return torch.lerp(x, near, a.to(x.dtype))
