"""Gated linear attention in chunks, one way or both ways, with its gradient written out.

Inside a chunk: the dense scores of decay_tree.py times the values; between chunks: the recurrence. The gradient of the
gates needs no differentiation of the decays: with G_t = g_1 + .. + g_t, and the terms s = t left out,

    dL/dG_t = q_t * dL/dq_t - k_t * dL/dk_t,   at the end plus sum_v S * dL/dS,   and   dL/dg_t = sum_(u >= t) dL/dG_u

Source: Yang et al. 2024, section 4.3 and appendix C, https://arxiv.org/abs/2312.06635. Read from right to left, E_t =
g_1 + .. + g_(t-1) takes the place of G_t, and queries and keys change places.
Shapes: N chunks of C tokens; one part is so many chunks that it stays in the cache, its M rows all (chunk, B, H).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import chunk_on
from frankenstein.mixers.decay_tree import LEAF, decay_totals, tree_climb, tree_descend, tree_scores
from frankenstein.mixers.gpu_kernels import in_both_directions, log_decay, recurrent_kernel

PART = 1 << 18  # elements of the queries of one part on CPU; other devices take all chunks at once


def chunk_length(length: int, chunk_size: int) -> int:
    """C: a power of two <= chunk_size, small enough that padding T to a multiple of C costs little."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise FrankensteinError(f"chunk_size={chunk_size} is not a power of two")
    size = min(1 << (length - 1).bit_length(), chunk_size)
    while size > LEAF and -length % size > length // 8:
        size //= 2
    return size


def chunk_view(x: Tensor, size: int) -> Tensor:
    """(B, N C, H, K) as (N, B, H, C, K), without a copy."""
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


def scan_chunks(written: Tensor, faded: Tensor, start: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """state <- faded_n * state + written_n over the chunks; with `reverse`, from the last to the first.

    In `written` (N, ..., K, V), the state that enters a chunk replaces what the chunk writes. `faded` is (N, ..., K);
    `start` (..., K, V), None for zeros. Returns the last state.
    """
    state = torch.zeros_like(written[0]) if start is None else start
    for n in range(len(written) - 1, -1, -1) if reverse else range(len(written)):
        following = torch.addcmul(written[n], state, faded[n].unsqueeze(-1))
        written[n] = state
        state = following
    return state


def gla_chunked(  # noqa: PLR0913  the operators' own arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    chunk_size: int,
    reverse: tuple[Tensor, Tensor] | None = None,
    initial_state: Tensor | None = None,
    both_ways: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gla`, or with `both_ways` the rule for encoders; see gla.py. Computed in float32 at least, or by a GPU kernel.

    Args:
        reverse: keys and log decays of the direction from right to left; None means k and g.
    Returns:  output (B, T, H, V), final state (B, H, K, V) of the direction from left to right; with `both_ways` it may
        be None.
    """
    if (kernel := recurrent_kernel("chunk_gla", q, v)) is not None:
        if both_ways:
            back = None if reverse is None else (reverse[0], log_decay(reverse[1]))
            return in_both_directions(kernel, q, k, v, (log_decay(g),), reverse=back, scale=scale), None
        return kernel(q, k, v, log_decay(g), scale=scale, initial_state=initial_state, output_final_state=True)
    length = q.shape[1]
    size = chunk_length(length, chunk_on(q, chunk_size, 128))
    inputs = [q, v, k, g, *(reverse or ())]
    if length % size:  # neither writing (k = 0) nor decaying (g = 0), padding changes nothing
        inputs = [F.pad(x, (0, 0, 0, 0, 0, -length % size)) for x in inputs]
    o, state = _ChunkedGLA.apply(scale, both_ways, size, initial_state, *inputs)
    return o[:, :length], state


class _ChunkedGLA(torch.autograd.Function):
    """The operator for T = N C. Kept for the gradient: the inputs, the scores, and per direction queries and states."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        scale, both_ways, size, start, *inputs = arguments
        q, v, _, g = inputs[:4]
        dtype = torch.promote_types(torch.promote_types(q.dtype, g.dtype), torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            inside = _inside_chunks([chunk_view(x, size) for x in inputs], 1 + both_ways, dtype)
            final = scan_chunks(inside.states[0], inside.faded[0], None if start is None else start.to(dtype))
            if both_ways:
                scan_chunks(inside.states[1], inside.faded[-1], reverse=True)
            for query, state in zip(inside.queries, inside.states, strict=True):
                inside.o.flatten(0, 2).baddbmm_(query.flatten(0, 2), state.flatten(0, 2))
            out = torch.empty_like(v, memory_format=torch.contiguous_format)
            torch.mul(inside.o, scale, out=chunk_view(out, size))
        ctx.save_for_backward(*inputs, inside.scores, final, *inside.queries, *inside.states, *inside.faded)
        ctx.settings = scale, both_ways, size, len(inputs), start is not None
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, both_ways, size, num_inputs, has_start = ctx.settings
        saved, directions = list(ctx.saved_tensors), 1 + both_ways
        inputs, (scores, final, *rest) = saved[:num_inputs], saved[num_inputs:]
        queries, states, faded = rest[:directions], rest[directions : 2 * directions], rest[2 * directions :]
        with torch.autocast(scores.device.type, enabled=False):
            d_o = scores.new_zeros(*scores.shape[:-1], inputs[1].shape[-1])
            if d_out is not None:
                torch.mul(chunk_view(d_out, size), scale, out=d_o)
            d_states = [(x.flatten(0, 2).mT @ d_o.flatten(0, 2)).unflatten(0, d_o.shape[:3]) for x in queries]
            d_start = scan_chunks(d_states[0], faded[0], d_final, reverse=True)
            if both_ways:
                scan_chunks(d_states[1], faded[-1])
            grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
            end = torch.zeros_like(faded[0][0]) if d_final is None else (final * d_final).sum(-1)
            _through_chunks(
                [chunk_view(x, size) for x in inputs],
                [chunk_view(x, size) for x in grads],
                scores,
                d_o,
                list(zip(states, d_states, strict=True)),
                end,
            )
        return None, None, None, d_start if has_start else None, *grads


@dataclass(frozen=True)
class _Inside:
    """What chunks compute without each other, (N, B, H, ...) each; lists hold one entry a direction."""

    o: Tensor  # (C, V), what the chunk's own tokens give
    scores: Tensor  # (C, C)
    queries: list[Tensor]  # (C, K), decayed from where the state enters
    states: list[Tensor]  # (K, V), written by the chunk
    faded: list[Tensor]  # (K), the decay over the whole chunk; one entry where both directions share it


def _inside_chunks(inputs: Sequence[Tensor], directions: int, dtype: torch.dtype) -> _Inside:
    """`inputs` are chunk views of q and v, then of keys and log decays, once or per direction."""
    outer, size = inputs[0].shape[:3], inputs[0].shape[3]
    width, value_width = inputs[0].shape[-1], inputs[1].shape[-1]

    def new(*shape: int) -> Tensor:
        return torch.empty(*outer, *shape, dtype=dtype, device=inputs[0].device)

    inside = _Inside(
        new(size, value_width),
        new(size, size).zero_(),
        [new(size, width) for _ in range(directions)],
        [new(width, value_width) for _ in range(directions)],
        [new(width) for _ in inputs[3::2]],
    )
    for part in _parts(inputs[0]):
        query, value, *turns = (_rows(x[part], dtype) for x in inputs)
        keys, totals = turns[::2], [decay_totals(gate.exp_()) for gate in turns[1::2]]
        scores = inside.scores[part].flatten(0, 2)
        scores.diagonal(dim1=1, dim2=2).copy_((query * keys[-1]).sum(-1))
        for total, faded in zip(totals, inside.faded, strict=True):
            faded[part] = total[-1].view_as(faded[part])
        for reverse in range(directions):
            turn = min(reverse, len(keys) - 1)
            decayed = torch.mul(query, totals[turn][0], out=inside.queries[reverse][part].flatten(0, 2))
            key = keys[turn] if directions == len(keys) else keys[turn].clone()
            tree_scores(*_roles(decayed, key, reverse), totals[turn], scores, reverse=bool(reverse))
            torch.bmm(key.mT, value, out=inside.states[reverse][part].flatten(0, 2))
        torch.bmm(scores, value, out=inside.o[part].flatten(0, 2))
    return inside


def _through_chunks(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Tensor,
    d_o: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
    end: Tensor,
) -> None:
    """Fills `grads`, the gradients of the inputs of `_inside_chunks`, from the last chunk to the first.

    `states` are those that enter the chunks, with their gradients, per direction; `end` (B, H, K) is dL/dG that comes
    from the final state.
    """
    ends = [end, torch.zeros_like(end)]
    for part in reversed(_parts(inputs[0])):
        query, value, *turns = (_rows(x[part], scores.dtype) for x in inputs)
        keys, totals = turns[::2], [decay_totals(gate.exp_()) for gate in turns[1::2]]
        d_out = d_o[part].flatten(0, 2)
        d_scores = d_out @ value.mT
        alone = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_query, d_value = keys[-1] * alone, scores[part].flatten(0, 2).mT @ d_out
        d_turns = [torch.zeros_like(x) for x in turns]
        torch.mul(query, alone, out=d_turns[-2])
        for reverse, pair in enumerate(states):
            turn = min(reverse, len(keys) - 1)
            state, d_state = (x[part].flatten(0, 2) for x in pair)
            decayed, key = query * totals[turn][0], keys[turn].clone()
            paired = tree_climb(*_roles(decayed, key, reverse), totals[turn])
            d_value.baddbmm_(key, d_state)
            to_query, to_key = d_out @ state.mT, value @ d_state.mT
            tree_descend(*_roles(to_query, to_key, reverse), paired, totals[turn], d_scores, reverse=bool(reverse))
            d_query += to_query.mul_(totals[turn][0])
            d_turns[2 * turn] += to_key
            gained, lost = _roles(to_query.mul_(query), to_key.mul_(keys[turn]), reverse)
            d_sums = gained.sub_(lost).view(inputs[0][part].shape)
            d_gate, ends[reverse] = _sums_to_end(d_sums, ends[reverse], skip_own=bool(reverse))
            d_turns[2 * turn + 1] += d_gate.flatten(0, 2)
        for grad, x in zip(grads, (d_query, d_value, *d_turns), strict=True):
            grad[part] = x.view(grad[part].shape)


def _sums_to_end(x: Tensor, end: Tensor, *, skip_own: bool) -> tuple[Tensor, Tensor]:
    """Sums of (N, B, H, C, K) over all tokens from t (after t with `skip_own`) and `end` (B, H, K); their total."""
    size = x.shape[3]
    weights = torch.ones(size, size, dtype=x.dtype, device=x.device).triu(int(skip_own))
    sums, chunks = weights @ x, x.sum(3)
    for n in range(len(x) - 1, -1, -1):
        sums[n] += end.unsqueeze(2)
        end = end + chunks[n]
    return sums, end


def _roles(query: Tensor, key: Tensor, reverse: int) -> tuple[Tensor, Tensor]:
    """What is decayed from the start of a block, and what to its end."""
    return (key, query) if reverse else (query, key)


def _parts(q: Tensor) -> list[slice]:
    """Slices of the chunks of (N, B, H, C, K) that are computed at once."""
    chunks, per_chunk = len(q), max(1, q[0].numel())
    step = chunks if q.device.type != "cpu" else max(1, PART // per_chunk)
    return [slice(n, min(n + step, chunks)) for n in range(0, chunks, step)]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, B, H, C, K) as a fresh (M, C, K)."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 2)
