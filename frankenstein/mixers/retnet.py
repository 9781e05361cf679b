"""Multi-scale retention: Sun et al. 2023, "Retentive Network", https://arxiv.org/abs/2307.08621.

    S_t = gamma S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t        one direction (their eq. 6)
    o_i = scale sum_j gamma^|i-j| (q_i . k_j) v_j                   both directions

An encoder reads both ways: y = f(x) + flip(f(flip x)) - f1(x), with f the recurrence above, flip the reversal of time
and f1 the recurrence on every token alone, which both directions count. Its dense form is the second line.
Shapes: q, k (B, T, H, K); v (B, T, H, V); log_gamma (H,); state S (B, H, K, V).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels.rms_norm import rms_norm
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext
from frankenstein.mixers.gpu_kernels import in_both_directions, log_decay, recurrent_kernel
from frankenstein.options import option

DECAYS = ("official", "seed_eq25", "linspace")


def retention_decay(num_heads: int, kind: str = "official") -> Tensor:
    """The decay gamma of every head, (H,) float64, for h = 0 .. H-1.

    official   1 - 2^-(5+h)        authors' code, https://github.com/microsoft/torchscale
    seed_eq25  1 - 2^-(5+7h/H)     seed 002 eq. 25
    linspace   1 - exp(linspace(log 1/32, log 1/512, H))
    """
    h = torch.arange(num_heads, dtype=torch.float64)
    if kind == "official":
        return 1 - torch.exp2(-5 - h)
    if kind == "seed_eq25":
        return 1 - torch.exp2(-5 - 7 * h / num_heads)
    if kind == "linspace":
        return 1 - torch.from_numpy(np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), num_heads)))
    raise FrankensteinError(f"unknown retention decay {kind!r}; known: {', '.join(DECAYS)}")


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `retention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gamma = log_gamma.exp()[:, None, None]
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = gamma * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state if output_final_state else None


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor | None]:
    """Causal retention, dense inside chunks and recurrent between them: linear in T.

    Source: Sun et al. 2023, eq. 7, https://arxiv.org/abs/2307.08621, without their row normalization (the norm after it
    cancels it). Only non-negative powers of gamma occur, so strong decay underflows to 0 and nothing overflows.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        log_gamma: (H,), log of the decay, <= 0; gets no gradient.
        scale: of the output; None means K**-0.5.
        initial_state: (B, H, K, V); None means zeros.
        output_final_state: return the last state, else None in its place.
        chunk_size: C, in tokens; any T works.
    Returns:  output (B, T, H, V), final state (B, H, K, V) or None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_gamma = log_gamma.detach()
    if (kernel := recurrent_kernel("chunk_simple_gla", q, v)) is not None:
        options = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kernel(q, k, v, g_gamma=log_decay(log_gamma), scale=scale, **options)
    if not q.is_cpu:
        return _all_at_once(q, k, v, log_gamma, scale, chunk_size, initial_state, keep_state=output_final_state)
    queries, keys, values = (_split(x, chunk_size) for x in (q, k, v))
    decay = scale * _powers(log_gamma, _distance(keys[0]), q).tril()
    written = len(keys) if output_final_state else len(keys) - 1
    states = _carry(keys[:written], values[:written], log_gamma, initial_state)
    outputs = []
    for query, key, value, state in zip(queries, keys, values, states, strict=False):
        o = _within(query, key, value, decay)
        if state is not None:
            o = o + (query * (scale * _powers(log_gamma, _steps(query) + 1, q))) @ state
        outputs.append(o)
    return _join(outputs), states[-1] if output_final_state else None


def bidirectional_retention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The rule of the module docstring, from the recurrence. Arguments as `bidirectional_retention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    real = 1.0 if mask is None else mask[:, :, None, None]
    k, v = k * real, v * real
    forward, _ = retention_recurrent(q, k, v, log_gamma, scale=scale)
    backward, _ = retention_recurrent(q.flip(1), k.flip(1), v.flip(1), log_gamma, scale=scale)
    alone = scale * (q * k).sum(-1, keepdim=True) * v
    return (forward + backward.flip(1) - alone) * real


def bidirectional_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """Retention in both directions, dense inside chunks and recurrent between them: linear in T.

    Source: the decay mask gamma^|i-j| is that of LION-D, Afzal et al. 2025, https://arxiv.org/abs/2502.16249, without
    its row normalization.
    Args:
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `retention`.
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_gamma = log_gamma.detach()
    padded = None if mask is None else ~mask[:, :, None, None]
    if padded is not None:
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
    if (kernel := recurrent_kernel("chunk_simple_gla", q, v)) is not None:
        o = in_both_directions(kernel, q, k, v, scale=scale, g_gamma=log_decay(log_gamma))
        return o if padded is None else o.masked_fill(padded, 0.0)
    if not q.is_cpu:
        o, _ = _all_at_once(q, k, v, log_gamma, scale, chunk_size, both_ways=True)
        return o if padded is None else o.masked_fill(padded, 0.0)
    queries, keys, values = (_split(x, chunk_size) for x in (q, k, v))
    decay = scale * _powers(log_gamma, _distance(keys[0]), q)
    before = _carry(keys[:-1], values[:-1], log_gamma)
    after = _carry(keys[:0:-1], values[:0:-1], log_gamma, reverse=True)[::-1]
    outputs = []
    for query, key, value, past, future in zip(queries, keys, values, before, after, strict=True):
        steps, length = _steps(query), query.shape[2]
        o = _within(query, key, value, decay)
        for state, distance in ((past, steps + 1), (future, length - steps)):
            if state is not None:
                o = o + (query * (scale * _powers(log_gamma, distance, q))) @ state
        outputs.append(o)
    o = _join(outputs)
    return o if padded is None else o.masked_fill(padded, 0.0)


def _all_at_once(  # noqa: PLR0913  the operators' own arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    scale: float,
    chunk_size: int,
    state: Tensor | None = None,
    *,
    both_ways: bool = False,
    keep_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Retention without a loop over chunks, for devices where each step of a loop costs more than its arithmetic.

    The states between N chunks are one product with the N x N decays between them. Returns the output and, for
    `keep_state`, the state after the last token.
    """
    length, size = q.shape[1], min(chunk_size, q.shape[1])
    chunks = -(-length // size)
    padding = (0, 0, 0, 0, 0, chunks * size - length)  # without a key, padding writes nothing
    query, key, value = (F.pad(x, padding).unflatten(1, (chunks, size)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    step = torch.arange(size, device=q.device)[:, None]
    decay = scale * _powers(log_gamma, _distance(query[0]), q)
    o = (query @ key.mT).mul_((decay if both_ways else decay.tril())[:, None]) @ value
    apart = torch.arange(chunks, device=q.device)
    apart = apart[:, None] - apart - 1  # whole chunks between a chunk and an earlier one
    for reverse in range(1 + both_ways):
        since, until = (size - step, step) if reverse else (step + 1, size - 1 - step)
        gap = -2 - apart if reverse else apart
        between = _powers(log_gamma, size * gap.clamp(min=0), q) * (gap >= 0)
        written = (key * _powers(log_gamma, until, q)[:, None]).mT @ value
        states = (between @ written.flatten(3)).view_as(written)
        if state is not None:
            faded = _powers(log_gamma, size * torch.arange(chunks, device=q.device)[:, None], q)
            states = states + faded[..., None] * state[:, :, None]
        o = o + (query * (scale * _powers(log_gamma, since, q))[:, None]) @ states
    o = o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
    if not keep_state:
        return o, None
    left = _powers(log_gamma, torch.arange(length - 1, -1, -1, device=q.device)[:, None], k)
    last = (k.transpose(1, 2) * left).mT @ v.transpose(1, 2)
    if state is not None:
        last = last + (log_gamma * length).exp().to(last.dtype)[:, None, None] * state
    return o, last


def _split(x: Tensor, chunk_size: int) -> Sequence[Tensor]:
    """(B, T, H, K) to chunks (B, H, L, K); a single one is not split, which would cost copies."""
    x = x.transpose(1, 2)
    return (x,) if x.shape[2] <= chunk_size else x.split(chunk_size, 2)


def _join(chunks: Sequence[Tensor]) -> Tensor:
    """The inverse of `_split`."""
    return (chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), 2)).transpose(1, 2)


def _steps(chunk: Tensor) -> Tensor:
    """(L, 1): 0 .. L-1 for a chunk (B, H, L, K)."""
    return torch.arange(chunk.shape[2], device=chunk.device)[:, None]


def _distance(chunk: Tensor) -> Tensor:
    """(L, L): |i - j|, for a chunk (B, H, L, K)."""
    steps = _steps(chunk)
    return (steps - steps.T).abs()


def _powers(log_gamma: Tensor, exponents: Tensor, like: Tensor) -> Tensor:
    """(H, ...): gamma to exponents >= 0, in the dtype of `like`."""
    return (log_gamma[:, None, None] * exponents).exp().to(like.dtype)


def _within(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """(B, H, L, V): what the tokens of one chunk give each other; decay (H, C, C) with C >= L."""
    length = q.shape[2]
    return (q @ k.mT).mul_(decay[:, :length, :length]) @ v


def _carry(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    log_gamma: Tensor,
    state: Tensor | None = None,
    *,
    reverse: bool = False,
) -> list[Tensor | None]:
    """The state before each chunk and after the last; with `reverse`, chunks come last first, read backwards."""
    states = [state]
    for k, v in zip(keys, values, strict=True):
        steps, length = _steps(k), k.shape[2]
        written = (k * _powers(log_gamma, steps if reverse else length - 1 - steps, k)).mT @ v
        faded = 0.0 if state is None else _powers(log_gamma, torch.full_like(steps[:1], length), state) * state
        state = written + faded
        states.append(state)
    return states


@MIXERS.register("retnet", "retnet_attn")
class MultiScaleRetention(Mixer):
    """Multi-scale retention with rotation, per-head norm and swish gate.

    Source: Sun et al. 2023, eq. 8, https://arxiv.org/abs/2307.08621; code https://github.com/microsoft/torchscale.
    Values are as wide as keys (seed 002 section 4.2; the authors double them), and the rotation is the encoder's.
    """

    parameter_group: ClassVar[str] = "retnet"

    @dataclass(frozen=True)
    class Options:
        """Options of `retnet`."""

        decay: str = option(
            "official", "Decays of the heads: the authors', seed 002 eq. 25, or log-spaced.", enum=list(DECAYS)
        )
        chunk_size: int = option(
            128, "Tokens that are computed densely at once; longer rows take linear time.", minimum=1
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        self.causal, self.chunk_size = context.causal, options.chunk_size
        self.project = HeadProjections(context, context.retention_heads, 4)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)
        self.log_gamma: Tensor
        log_gamma = retention_decay(context.retention_heads, options.decay).log().to(torch.get_default_dtype())
        self.register_buffer("log_gamma", log_gamma, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v, gate = self.project(x)
        if self.causal:  # padding comes last, so that no real token sees it
            o, _ = retention(q, k, v, self.log_gamma, chunk_size=self.chunk_size)
        else:
            o = bidirectional_retention(q, k, v, self.log_gamma, mask=mask, chunk_size=self.chunk_size)
        o = rms_norm(o)
        return self.out((o * F.silu(gate)).flatten(2))
