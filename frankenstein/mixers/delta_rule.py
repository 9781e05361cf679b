"""The delta rule: Yang et al. 2024, https://arxiv.org/abs/2406.06484, and with a decay, https://arxiv.org/abs/2412.06464.

    S_t = a_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T,   o_t = scale S_t^T q_t        a_t = exp(g_t)

The state answers a key with a value; each token corrects the answer to its own key by the share beta. Without decay
a_t = 1. An encoder reads both ways: y = f(x) + flip(f(flip x)) - f1(x), with f the recurrence above, flip the reversal
of time and f1 the recurrence on every token alone, scale beta_t (q_t . k_t) v_t. As the write depends on the state, f1
is not exactly what both directions count: the rule is our definition, not a published operator.
Shapes: q, k (B, T, H, K); v (B, T, H, V); g, beta (B, T, H); state S (B, H, K, V). The caller normalizes q and k.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from frankenstein.mixers.base import chunk_on
from frankenstein.mixers.delta_chunks import (
    Gradients,
    bidirectional,
    delta_chunks,
    from_chunks,
    full_precision,
    in_full_precision,
    in_segments,
    reads_and_writes,
    seen,
    to_chunks,
    wide,
)
from frankenstein.mixers.gpu_kernels import log_decay, recurrent_kernel


def gated_delta_rule_recurrent(
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
    """The recurrence, one token at a time. Arguments as `gated_delta_rule`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * error[:, :, None]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state if output_final_state else None


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence without decay, one token at a time. Arguments as `delta_rule`."""
    return gated_delta_rule_recurrent(
        q,
        k,
        v,
        torch.zeros_like(beta),
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor | None]:
    """Causal delta rule without decay. Source: Yang et al. 2024, https://arxiv.org/abs/2406.06484.

    Args and returns: as `gated_delta_rule`, without g.
    """
    return _chunked(q, k, v, None, beta, scale, initial_state, output_final_state, chunk_size)


def gated_delta_rule(  # noqa: PLR0913  the contract's arguments
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
    """Causal gated delta rule, parallel inside chunks and recurrent between them: linear in T.

    Source: Yang et al. 2024, https://arxiv.org/abs/2412.06464. Decays enter as exp of a difference <= 0
    only, so strong decay underflows to 0 and nothing overflows.
    Args:
        q, k: (B, T, H, K); a key longer than 1 can make the state grow.
        v: (B, T, H, V).
        g: (B, T, H), log of the decay, finite, <= 0.
        beta: (B, T, H), share of the error that is written, in (0, 1), or up to 2 for negative eigenvalues.
        scale: of the output; None means K**-0.5.
        initial_state: (B, H, K, V); None means zeros.
        output_final_state: return the last state, else None in its place.
        chunk_size: C, in tokens; any T works.
    Returns:  output (B, T, H, V), final state (B, H, K, V) or None.
    """
    return _chunked(q, k, v, g, beta, scale, initial_state, output_final_state, chunk_size)


def bidirectional_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    beta_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """Delta rule in both directions, by the rule of the module docstring: linear in T.

    Args and returns: as `bidirectional_gated_delta_rule`, without g.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float) -> Tensor:
        return delta_rule(q, k, v, beta, scale=scale, chunk_size=chunk_size)[0]

    return bidirectional(rule, q, k, v, (beta,), (beta_rev,), mask=mask, scale=scale)


def bidirectional_gated_delta_rule(  # noqa: PLR0913  the contract's arguments
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
    """Gated delta rule in both directions, by the rule of the module docstring: linear in T.

    Source: the recurrence is that of Yang et al. 2024, https://arxiv.org/abs/2412.06464; the rule is ours.
    Args:
        g_rev, beta_rev: (B, T, H), those of the reverse direction in original time order; None means the same.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `gated_delta_rule`.
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
        return gated_delta_rule(q, k, v, g, beta, scale=scale, chunk_size=chunk_size)[0]

    return bidirectional(rule, q, k, v, (g, beta), (g_rev, beta_rev), mask=mask, scale=scale)


def _chunked(  # noqa: PLR0913  what both operators take
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    state: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    if (kernel := recurrent_kernel("chunk_delta_rule" if g is None else "chunk_gated_delta_rule", q, v)) is not None:
        gates = (beta.to(v.dtype),) if g is None else (log_decay(g), beta)
        return kernel(q, k, v, *gates, scale=scale, initial_state=state, output_final_state=output_final_state)
    chunk_size = chunk_on(q, chunk_size, 64)
    size = -(-q.shape[1] // -(-q.shape[1] // chunk_size))  # chunks of equal length waste the least
    state = None if state is None else wide(state).flatten(0, 1)
    with full_precision(q):
        inputs = (scale * wide(q), wide(k), wide(v), wide(beta))
        if g is None:
            o, final = in_segments(partial(_segment, size), inputs, state, size)
        else:
            o, final = in_segments(partial(_gated_segment, size), (*inputs, wide(g)), state, size)
    return o.to(dtype), final.unflatten(0, (len(q), -1)).to(dtype) if output_final_state else None


def _segment(size: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Chunks of `size` tokens; queries come scaled."""
    reads, writes = reads_and_writes(q, k, beta, size)
    gram = (reads @ writes.mT) * seen(writes)
    o, final = delta_chunks(reads, writes, to_chunks(v, size), gram, None, state)
    return from_chunks(o, q), final


def _gated_segment(
    size: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunks of `size` tokens; queries come scaled."""
    gram, reads, writes, last = _Decay.apply(*reads_and_writes(q, k, beta, size), to_chunks(g[..., None], size))
    o, final = delta_chunks(reads, writes, to_chunks(v, size), gram, last, state)
    return from_chunks(o, q), final


class _Decay(torch.autograd.Function):
    """What `delta_chunks` needs, from reads r, writes w and log decays g (N, BH, C, 1); c = cumsum(g) over the chunk.

        gram exp(c_i - c_j) r_i . w_j;  reads exp(c_i) r_i;  writes exp(c_C - c_j) w_j;  last exp(c_C)

    By hand, as reads carry exp(c_i) and writes exp(-c_j), so that the gradient of c is two sums over their rows.
    """

    @staticmethod
    def forward(ctx: Any, reads: Tensor, writes: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c = g.cumsum(-2)
        since, until = c.exp(), (c[:, :, -1:] - c).exp()
        ctx.save_for_backward(reads, writes, c)
        gram = (reads @ writes.mT).mul_(_weights(writes, c))
        faded = (reads.unflatten(2, (-1, 2)) * since[..., None]).flatten(2, 3)
        return gram, faded, writes * until, since[:, :, -1:].clone()

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, d_gram: Tensor, d_faded: Tensor, d_left: Tensor, d_last: Tensor) -> Gradients:
        reads, writes, c = ctx.saved_tensors
        since, until = c.exp(), (c[:, :, -1:] - c).exp()
        d_gram = (d_gram * _weights(writes, c)).flatten(0, 1)
        d_reads = (d_faded.unflatten(2, (-1, 2)) * since[..., None]).flatten(2, 3)
        d_reads.flatten(0, 1).baddbmm_(d_gram, writes.flatten(0, 1))
        d_writes = d_left * until
        kept = (writes * d_writes).sum((-2, -1), keepdim=True)
        d_writes.flatten(0, 1).baddbmm_(d_gram.mT, reads.flatten(0, 1))
        d_c = (reads * d_reads).unflatten(2, (-1, 2)).sum((-2, -1)) - (writes * d_writes).sum(-1)
        d_c = d_c[..., None]
        d_c[:, :, -1:] += kept + d_last * since[:, :, -1:]
        return d_reads, d_writes, d_c.flip(-2).cumsum(-2).flip(-2)


def _weights(writes: Tensor, c: Tensor) -> Tensor:
    """(N, BH, 2C, C): exp(c_i - c_j) where token i sees token j, else 0."""
    decay = (c - c.mT).clamp_(max=0).exp_()
    return (decay[..., None, :] * seen(writes).unflatten(0, (-1, 2))).flatten(2, 3)
