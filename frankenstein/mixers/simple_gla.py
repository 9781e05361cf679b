"""Linear attention with one decay per head and token ("simple" gated linear attention).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t

Source: the scalar case of Yang et al. 2024, https://arxiv.org/abs/2312.06635 (section 3), the same recurrence as
Mamba-2's, Dao and Gu 2024, https://arxiv.org/abs/2405.21060. An encoder reads both ways: y = f(x) + flip(f(flip x)) -
f1(x), see gla.py; inside a chunk that is the mask of LION-S, Afzal et al. 2025, https://arxiv.org/abs/2502.16249, with
the decay of the token that reads.
Shapes: q, k (B, T, H, K); v (B, T, H, V); log decay g (B, T, H), <= 0; state S (B, H, K, V); N chunks of C tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.mixers.base import chunk_on
from frankenstein.mixers.chunked_gla import chunk_length, chunk_view
from frankenstein.mixers.decay_tree import decay_totals, tree_scores
from frankenstein.mixers.gpu_kernels import in_both_directions, log_decay, recurrent_kernel


def simple_gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `simple_gla`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state if output_final_state else None


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a decay per head, dense inside chunks and recurrent between them: linear in T.

    Source: Dao and Gu 2024, section 6, https://arxiv.org/abs/2405.21060. Decays between two tokens are sums of their
    own log decays, never differences or quotients of longer ones; g = -inf forgets all.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        g: (B, T, H), log of the decay before the write, <= 0; 0 keeps everything.
        scale: of the output; None means K**-0.5.
        initial_state: (B, H, K, V); None means zeros.
        output_final_state: return the last state, else None in its place.
        chunk_size: largest C, a power of two, in tokens; any T works.
    Returns:  output (B, T, H, V), final state (B, H, K, V) or None.
    """
    o, state = _chunked(q, k, v, [g], scale, initial_state, chunk_size)
    return o, state if output_final_state else None


def bidirectional_simple_gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    g_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The rule of the module docstring, from the recurrence. Arguments as `bidirectional_simple_gla`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g_rev = g if g_rev is None else g_rev
    real = 1.0 if mask is None else mask[:, :, None, None]
    k, v = k * real, v * real
    forward, _ = simple_gla_recurrent(q, k, v, g, scale=scale)
    backward, _ = simple_gla_recurrent(q.flip(1), k.flip(1), v.flip(1), g_rev.flip(1), scale=scale)
    alone = scale * (q * k).sum(-1, keepdim=True) * v
    return (forward + backward.flip(1) - alone) * real


def bidirectional_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    g_rev: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Linear attention with a decay per head in both directions, dense inside chunks: linear in T.

    Args:
        g_rev: (B, T, H), decay of the direction from right to left, in the order of the tokens; None means g.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `simple_gla`.
    Returns:  (B, T, H, V).
    """
    gates = [g, g if g_rev is None else g_rev]
    padded = None if mask is None else ~mask[:, :, None, None]
    if padded is not None:
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
        gates = [x.masked_fill(padded[..., 0], 0.0) for x in gates]
    o, _ = _chunked(q, k, v, gates, scale, None, chunk_size)
    return o if padded is None else o.masked_fill(padded, 0.0)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], scale: float | None, start: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor | None]:
    """Output (B, T, H, V) and, one way, the final state; a second gate is that of the way back."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (kernel := recurrent_kernel("chunk_simple_gla", q, v)) is not None:
        g, *back = (log_decay(x) for x in gates)
        if back:
            return in_both_directions(kernel, q, k, v, (g,), reverse=(k, *back), scale=scale), None
        return kernel(q, k, v, g, scale=scale, initial_state=start, output_final_state=True)
    size = chunk_length(q.shape[1], chunk_on(q, chunk_size, 128))
    dtype = torch.promote_types(torch.promote_types(q.dtype, gates[0].dtype), torch.float32)
    inputs = [x.to(dtype) for x in (q, k, v, *(g.unsqueeze(-1) for g in gates))]
    with torch.autocast(q.device.type, enabled=False):
        o, state = _in_chunks(inputs, scale, start, size)
    return o[:, : q.shape[1]].to(v.dtype), state


def _in_chunks(inputs: list[Tensor], scale: float, start: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    length = inputs[0].shape[1]
    if length % size:  # neither writing (k = 0) nor decaying (g = 0), padding changes nothing
        inputs = [F.pad(x, (0, 0, 0, 0, 0, -length % size)) for x in inputs]
    views = [chunk_view(x, size) for x in inputs]
    outer = views[0].shape[:3]
    query, key, value = (x.reshape(-1, *x.shape[3:]) for x in views[:3])
    within, *ends = _ChunkDecays.apply(*(x.reshape(-1, size, 1) for x in views[3:]))
    o = ((query @ key.mT) * within) @ value
    finals = []
    for reverse, (entering, leaving) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
        written = ((key * leaving).mT @ value).unflatten(0, outer)
        whole = entering[:, :1] if reverse else entering[:, -1:]
        states, final = _scan(written, whole.unflatten(0, outer), None if reverse else start, reverse=bool(reverse))
        finals.append(final)
        o = torch.baddbmm(o, query * entering, states.flatten(0, 2))
    o = (o * scale).unflatten(0, outer).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o, finals[0]


def _scan(written: Tensor, whole: Tensor, state: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states (N, B, H, K, V) that enter the chunks, and the last one."""
    state = torch.zeros_like(written[0]) if state is None else state
    entering = []
    steps = list(zip(written.unbind(0), whole.unbind(0), strict=True))
    for chunk, fade in reversed(steps) if reverse else steps:
        entering.append(state)
        state = torch.addcmul(chunk, state, fade)
    return torch.stack(entering[::-1] if reverse else entering), state


class _ChunkDecays(torch.autograd.Function):
    """Decays between the tokens of each chunk, and between its tokens and its ends.

    From log decays (M, C, 1) of one or two directions: W (M, C, C), 1 on the diagonal, below it the decay from s < t to
    t, above it that of the way back (0 for one direction); then, per direction, from where the state enters to each
    token and from each token to where the state leaves, (M, C, 1) each.
    """

    @staticmethod
    def forward(ctx: Any, *gates: Tensor) -> tuple[Tensor, ...]:
        rows, size, _ = gates[0].shape
        within = torch.zeros(rows, size, size, dtype=gates[0].dtype, device=gates[0].device)
        within.diagonal(dim1=1, dim2=2).fill_(1.0)
        ends = []
        for reverse, gate in enumerate(gates):
            decay = gate.exp().contiguous()
            entering, leaving = decay.clone(), torch.ones_like(decay)
            pair = (leaving, entering) if reverse else (entering, leaving)
            tree_scores(*pair, decay_totals(decay), within, reverse=bool(reverse))
            ends += [entering, leaving]
        ctx.save_for_backward(within, *ends)
        return within, *ends

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_within: Tensor, *d_ends: Tensor) -> tuple[Tensor, ...]:
        within, *ends = ctx.saved_tensors
        flow = d_within * within
        d_gates = []
        terms = [x * d for x, d in zip(ends, d_ends, strict=True)]
        for reverse, (entered, left) in enumerate(zip(terms[::2], terms[1::2], strict=True)):
            part = flow.triu(1) if reverse else flow.tril(-1)
            # dL/dG of the summed log decays up to each token, as in chunked_gla.py; a gate is in all sums after it
            d_sums = part.sum(2, keepdim=True) - part.sum(1).unsqueeze(-1) + entered - left
            d_gate = d_sums.cumsum(1) if reverse else d_sums.flip(1).cumsum(1).flip(1)
            d_gates.append(d_gate + left.sum(1, keepdim=True))
        return tuple(d_gates)
