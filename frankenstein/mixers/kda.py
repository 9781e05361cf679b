"""Kimi Delta Attention: Kimi Team 2025, "Kimi Linear", section 3, https://arxiv.org/abs/2510.26692.

    S_t = (I - beta_t k_t k_t^T) diag(a_t) S_(t-1) + beta_t k_t v_t^T,   o_t = scale S_t^T q_t        a_t = exp(g_t)

The gated delta rule with a decay of its own for every channel of the key. An encoder reads both ways by the rule of
`delta_rule`: y = f(x) + flip(f(flip x)) - f1(x), f1 being scale beta_t (q_t . k_t) v_t.
Shapes: q, k, g (B, T, H, K); v (B, T, H, V); beta (B, T, H); state S (B, H, K, V). The caller normalizes q and k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import RMSNorm
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext, chunk_on
from frankenstein.mixers.delta_chunks import (
    Gradients,
    bidirectional,
    delta_chunks,
    from_chunks,
    full_precision,
    in_full_precision,
    in_segments,
    reads_and_writes,
    to_chunks,
    wide,
)
from frankenstein.mixers.deltanet import DeltaProjections, count_directions, draw_weights, gate_inputs, gate_weight
from frankenstein.mixers.gated_deltanet import decay_bias, decay_scale, value_channels
from frankenstein.mixers.gpu_kernels import log_decay, recurrent_kernel
from frankenstein.options import option


def kda_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `kda`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * error[:, :, None]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state if output_final_state else None


def kda(  # noqa: PLR0913  the arguments of the other recurrent operators
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """Causal Kimi delta rule, parallel inside chunks and recurrent between them: linear in T.

    Source: Kimi Team 2025, section 3, https://arxiv.org/abs/2510.26692. Their equations divide by cumulated decays;
    here every decay is a product of factors <= 1, so that strong decay underflows to 0.
    Args:
        q, k: (B, T, H, K); a key longer than 1 can make the state grow.
        v: (B, T, H, V).
        g: (B, T, H, K), log of the decay of each key channel, finite, <= 0.
        beta: (B, T, H), share of the error that is written, in (0, 1), or up to 2 for negative eigenvalues.
        scale: of the output; None means K**-0.5.
        initial_state: (B, H, K, V); None means zeros.
        output_final_state: return the last state, else None in its place.
        chunk_size: C, in tokens, a power of two; any T works.
    Returns:  output (B, T, H, V), final state (B, H, K, V) or None.
    Raises:   FrankensteinError: if chunk_size is not a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise FrankensteinError(f"chunk_size={chunk_size} is not a power of two")
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    if (kernel := recurrent_kernel("chunk_kda", q, v)) is not None:
        options = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kernel(q, k, v, log_decay(g), beta, scale=scale, **options)
    size = min(chunk_on(q, chunk_size, 64), 1 << (q.shape[1] - 1).bit_length())
    state = None if initial_state is None else wide(initial_state).flatten(0, 1)
    with full_precision(q):
        inputs = (scale * wide(q), wide(k), wide(v), wide(g), wide(beta))
        o, final = in_segments(partial(_segment, size), inputs, state, size)
    return o.to(dtype), final.unflatten(0, (len(q), -1)).to(dtype) if output_final_state else None


def bidirectional_kda(  # noqa: PLR0913  the arguments of the other bidirectional operators
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    g_rev: Tensor | None = None,
    beta_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """Kimi delta rule in both directions, by the rule of the module docstring: linear in T.

    Source: the recurrence is that of https://arxiv.org/abs/2510.26692; the rule is ours.
    Args:
        g_rev: (B, T, H, K), that of the reverse direction in original time order; None means the same.
        beta_rev: (B, T, H), likewise.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `kda`.
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
        return kda(q, k, v, g, beta, scale=scale, chunk_size=chunk_size)[0]

    return bidirectional(rule, q, k, v, (g, beta), (g_rev, beta_rev), mask=mask, scale=scale)


def _segment(
    size: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunks of `size` tokens; queries come scaled."""
    gram, reads, writes, last = _Decay.apply(*reads_and_writes(q, k, beta, size), to_chunks(g, size))
    o, final = delta_chunks(reads, writes, to_chunks(v, size), gram, last.mT, state)
    return from_chunks(o, q), final


class _Decay(torch.autograd.Function):
    """What `delta_chunks` needs, from reads r, writes w and log decays g (N, BH, C, K); c = cumsum(g) over the chunk.

        gram sum_k exp(c_ik - c_jk) r_ik w_jk;  reads exp(c_i) r_i;  writes exp(c_C - c_j) w_j;  last exp(c_C)

    The tokens of two neighbouring halves meet at the border between them: reads decay since it, writes up to it, and
    one matrix product gives the square of their pairs. Doubling the halves covers the triangle.
    """

    @staticmethod
    def forward(ctx: Any, reads: Tensor, writes: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(reads, writes, g)
        since, until = g.exp(), torch.ones_like(g)
        gram = reads.new_zeros(*reads.shape[:-1], writes.shape[-2])
        _own(gram).copy_((_by_token(reads)[..., 0, :] * writes).sum(-1))
        for half, row_decay, column_decay in _levels(since, until):
            later = (_later(reads, half) * row_decay).flatten(1, 2)
            squares = _squares(gram, half)
            squares.copy_((later @ (_earlier(writes, half) * column_decay).mT).view_as(squares))
        faded = (_by_token(reads) * since[..., None, :]).flatten(2, 3)
        return gram, faded, writes * until, since[:, :, -1:].clone()

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, d_gram: Tensor, d_faded: Tensor, d_left: Tensor, d_last: Tensor) -> Gradients:
        reads, writes, g = ctx.saved_tensors
        since, until = g.exp(), torch.ones_like(g)
        own = _own(d_gram)[..., None]
        d_reads, d_writes = torch.zeros_like(reads), own * _by_token(reads)[..., 0, :]
        torch.mul(own, writes, out=_by_token(d_reads)[..., 0, :])
        for half, row_decay, column_decay in _levels(since, until):
            d_squares = _squares(d_gram, half).flatten(0, 1)
            later = (_later(reads, half) * row_decay).flatten(1, 2)
            earlier = _earlier(writes, half) * column_decay
            d_later = _later(d_reads, half)
            d_later.addcmul_((d_squares @ earlier).view_as(d_later), row_decay)
            _earlier(d_writes, half).addcmul_(d_squares.mT @ later, column_decay)
        _by_token(d_reads).addcmul_(_by_token(d_faded), since[..., None, :])
        d_kept = d_left * until
        d_writes += d_kept
        d_c = _by_token(reads * d_reads).sum(-2) - writes * d_writes
        # Reads carry exp(c_i) and writes exp(-c_j), so that these products are the gradient of c; c_C is in all decays
        # up to the end.
        d_c[:, :, -1:] += (writes * d_kept).sum(-2, keepdim=True) + d_last * since[:, :, -1:]
        return d_reads, d_writes, d_c.flip(-2).cumsum(-2).flip(-2)


def _levels(since: Tensor, until: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Halves of 1, 2, 4, ... tokens, the decays of their rows since the border and of their columns up to it.

    Decays since the first and up to the last token of a half grow in place with the halves, in the end to the chunk's.
    """
    half = 1
    while half < since.shape[-2]:
        starts, ends = (x.view(-1, 2, half, x.shape[-1]) for x in (since, until))
        yield half, starts[:, 1, :, None], ends[:, 0]
        second = starts[:, 1, -1:].clone()
        starts[:, 1] *= starts[:, 0, -1:]
        ends[:, 0] *= second
        half *= 2


def _by_token(reads: Tensor) -> Tensor:
    """(..., 2C, K) to (..., C, 2, K): query and key of each token."""
    return reads.unflatten(-2, (-1, 2))


def _later(reads: Tensor, half: int) -> Tensor:
    """Reads of the second halves, (pairs of halves, half, 2, K)."""
    return reads.view(-1, 2, half, 2, reads.shape[-1])[:, 1]


def _earlier(writes: Tensor, half: int) -> Tensor:
    """Writes of the first halves, (pairs of halves, half, K)."""
    return writes.view(-1, 2, half, writes.shape[-1])[:, 0]


def _own(gram: Tensor) -> Tensor:
    """What queries see of their own token, (..., C)."""
    return gram.unflatten(-2, (-1, 2))[..., 0, :].diagonal(dim1=-2, dim2=-1)


def _squares(gram: Tensor, half: int) -> Tensor:
    """What second halves see of first halves, (N BH, C / 2 half, 2 half, half)."""
    count = gram.shape[-1] // (2 * half)
    pairs = gram.view(-1, count, 2, 2 * half, count, 2, half)[:, :, 1, :, :, 0]
    return pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


@MIXERS.register("kda_attn")
class KimiDeltaAttention(Mixer):
    """Kimi Delta Attention with short convolutions, a low-rank decay per channel and a low-rank sigmoid output gate.

        g = -exp(A) softplus(x W_1 W_2 + b),   beta = sigmoid(x W_b)
        q, k = l2_norm(silu(conv(x W))),   v = silu(conv(x W_v))
        y = W_o (rms_norm(kda(q, k, v, g, beta)) * sigmoid(x W_3 W_4 + c))

    Source: Kimi Team 2025, section 4, https://arxiv.org/abs/2510.26692; sizes, ranks and initial values as in the code
    https://github.com/fla-org/flash-linear-attention. In an encoder the convolution is centred and the delta rule runs
    in both directions.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the recurrence tells them; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `kda_attn`."""

        head_dim: int | None = option(None, "Key channels of a head; null takes hidden size / heads.", minimum=1)
        expand_v: float = option(1.0, "Value channels of a head, as a ratio of its key channels.", exclusiveMinimum=0)
        conv_size: int = option(4, "Tokens that the short convolution sees to each side; 0 leaves it out.", minimum=0)
        conv_bias: bool = option(False, "Add a bias to the short convolution.")
        allow_neg_eigval: bool = option(False, "Writing strength up to 2, for negative eigenvalues of the transition.")
        separate_directions: bool = option(False, "Decay and writing strength of their own for the reverse direction.")
        chunk_size: int = option(
            32,
            "Tokens that are computed at once, on a GPU 64 or more; any length takes linear time.",
            enum=[8, 16, 32, 64, 128],
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        heads, hidden = context.num_heads, context.hidden_size
        key_size = options.head_dim or max(1, hidden // heads)
        value_size = value_channels(key_size, options.expand_v, "model.mixers.kda_attn.expand_v")
        self.options, self.causal, self.num_heads = options, context.causal, heads
        self.project = DeltaProjections(context, key_size, value_size, options.conv_size, options.conv_bias)
        directions = count_directions(context, options.separate_directions, "kda_attn")
        self.beta = gate_weight(directions * heads, hidden)
        self.decay_down = gate_weight(value_size, hidden)
        self.decay_up = gate_weight(directions * heads * key_size, value_size)
        self.A_log = decay_scale(directions, heads, 1, low=1.0)
        self.dt_bias = decay_bias(directions, heads, key_size)
        self.gate_down = nn.Linear(hidden, value_size, bias=False)
        self.gate_up = nn.Linear(value_size, heads * value_size)
        self.norm = RMSNorm(value_size, eps=1e-5)
        self.out = nn.Linear(heads * value_size, hidden, bias=False)
        draw_weights(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x, mask)
        g, beta = self._gates(x)
        size = self.options.chunk_size
        if self.causal:  # padding comes last, so that no real token sees it
            o, _ = kda(q, k, v, g[0], beta[0], chunk_size=size)
        else:
            o = bidirectional_kda(q, k, v, g[0], beta[0], g_rev=g[-1], beta_rev=beta[-1], mask=mask, chunk_size=size)
        return self.out(self.norm(o).flatten(2) * self.gate_up(self.gate_down(x)).sigmoid())

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays (1 or 2, B, T, H, K) and writing strengths (1 or 2, B, T, H) of the directions."""
        directions, heads, _ = self.dt_bias.shape
        low = gate_inputs(x, self.decay_down, self.decay_up).unflatten(-1, (directions, heads, -1))
        g = -self.A_log.exp() * F.softplus(low + self.dt_bias)
        beta = gate_inputs(x, self.beta).sigmoid() * (2 if self.options.allow_neg_eigval else 1)
        return g.movedim(2, 0), beta.unflatten(-1, (directions, heads)).movedim(2, 0)
