"""The chunk-parallel delta rule that `delta_rule` and `kda` share: Yang et al. 2024, section 3, with decay.

    e_i = v_i - S'^T k_i,   S_i = S' + w_i e_i^T,   o_i = S_i^T q_i       S' = the state S_(i-1), faded; w = beta k

Inside a chunk that starts from the state S, with G_ij and A_ij what the key and the query of token i see of the write
of token j (j < i and j <= i), and d the decays from the start or to the end of the chunk:

    (I + G) E = V - (d K) S,   O = (d Q) S + A E,   S <- d S + (d W)^T E

E are the pseudo-values of their UT transform. All but S is computed for all chunks at once; the loop over chunks keeps
the products with S. Its gradient is the same algorithm run backwards, written by hand.
Source: https://arxiv.org/abs/2406.06484; decay: https://arxiv.org/abs/2412.06464.
Shapes: N chunks of C tokens, B H rows; `reads` (N, BH, 2C, K) are the query and key of token 0, those of token 1, ...
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows x tokens computed at once on a CPU: temporaries stay below the size that malloc takes from and gives back to the
# system at each use, which costs more than computing them.
SEGMENT = 1 << 13

Gradients = tuple[Tensor | None, ...]


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: states and inverses lose too much in half precision."""
    return torch.autocast(x.device.type, enabled=False)


def in_full_precision(backward: Callable[..., Gradients]) -> Callable[..., Any]:
    """Autocast off in a backward pass, which may be called inside of it; there is no second derivative."""

    @once_differentiable
    @wraps(backward)
    def guarded(ctx: Any, *gradients: Any) -> Any:
        with full_precision(gradients[0]):
            return backward(ctx, *gradients)

    return guarded


def delta_chunks(
    reads: Tensor, writes: Tensor, values: Tensor, gram: Tensor, last: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loop over chunks.

    Args:
        reads: (N, BH, 2C, K), decayed from the start of the chunk; queries scaled.
        writes: (N, BH, C, K), beta k, decayed to the end of the chunk.
        values: (N, BH, C, V).
        gram: (N, BH, 2C, C), A and G of the module docstring in alternating rows.
        last: (N, BH, 1 or K, 1), decay of the state over a chunk; None means 1.
        state: (BH, K, V); None means zeros.
    Returns:  output (N, BH, C, V), final state (BH, K, V).
    """
    return _DeltaChunks.apply(reads, writes, values, gram, last, state)


class _DeltaChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        reads: Tensor,
        writes: Tensor,
        values: Tensor,
        gram: Tensor,
        last: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count, rows, size, width = writes.shape
        by_query, by_key = _halves(gram)
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(by_key, eye, upper=False, unitriangular=True)
        states = values.new_zeros(count + 1, rows, width, values.shape[-1])
        if state is not None:
            states[0] = state
        errors, outputs = torch.empty_like(values), torch.empty_like(values)
        for n in range(count):
            for_query, for_key = _halves(reads[n] @ states[n])
            torch.bmm(inverse[n], values[n] - for_key, out=errors[n])
            torch.baddbmm(for_query, by_query[n], errors[n], out=outputs[n])
            kept = states[n] if last is None else last[n] * states[n]
            torch.baddbmm(kept, writes[n].mT, errors[n], out=states[n + 1])
        ctx.save_for_backward(reads, writes, gram, last, inverse, errors, states)
        return outputs, states[-1].clone()

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, d_outputs: Tensor, d_state: Tensor) -> Gradients:
        reads, writes, gram, last, inverse, errors, states = ctx.saved_tensors
        d_reads, d_writes, d_gram = (torch.empty_like(x) for x in (reads, writes, gram))
        d_values = torch.empty_like(errors)
        d_last = None if last is None else torch.empty_like(last)
        # Gradient of what queries and keys read, in alternating rows.
        d_seen = errors.new_empty(*reads.shape[1:-1], errors.shape[-1])
        by_query, _ = _halves(gram)
        for n in reversed(range(len(writes))):
            d_errors = torch.baddbmm(writes[n] @ d_state, by_query[n].mT, d_outputs[n])
            torch.bmm(inverse[n].mT, d_errors, out=d_values[n])
            for_query, for_key = _halves(d_seen)
            for_query.copy_(d_outputs[n])
            torch.neg(d_values[n], out=for_key)
            torch.bmm(d_seen, states[n].mT, out=d_reads[n])
            torch.bmm(d_seen, errors[n].mT, out=d_gram[n])
            torch.bmm(errors[n], d_state.mT, out=d_writes[n])
            if last is not None and d_last is not None:
                d_last[n] = (d_state * states[n]).sum_to_size(last[n].shape)
                d_state = last[n] * d_state
            d_state = torch.baddbmm(d_state, reads[n].mT, d_seen)
        return d_reads, d_writes, d_values, d_gram, d_last, d_state if ctx.needs_input_grad[5] else None


def in_segments(
    rule: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """The rule on one piece of time after the other, where all at once would be too much memory.

    Args:
        rule: maps pieces of the inputs and the state before them to their output and the state after them.
        inputs: (B, T, H, ...) each.
        state: (B H, K, V) or None.
        size: C; pieces are whole chunks, as long as there is a next one.
    Returns:  output (B, T, H, V), final state (B H, K, V).
    """
    batch, length, heads = inputs[0].shape[:3]
    fitting = SEGMENT // (batch * heads) if inputs[0].device.type == "cpu" else length
    piece = max(-(-min(fitting, length) // size), 1) * size
    first, *more = zip(*(x.split(piece, 1) for x in inputs), strict=True)
    o, state = rule(*first, state)
    outputs = [o]
    for pieces in more:
        o, state = rule(*pieces, state)
        outputs.append(o)
    return torch.cat(outputs, 1) if more else o, state


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2C, V) to the rows of the queries and those of the keys, (..., C, V) each."""
    queries, keys = x.unflatten(-2, (-1, 2)).unbind(-2)
    return queries, keys


def seen(writes: Tensor) -> Tensor:
    """(2C, C): 1 where the query of a token sees a token, itself included, and where its key sees an earlier one."""
    past = writes.new_ones(writes.shape[-2], writes.shape[-2]).tril()
    return torch.stack([past, past.tril(-1)], 1).flatten(0, 1)


def reads_and_writes(q: Tensor, k: Tensor, beta: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Reads (N, BH, 2C, K) and writes (N, BH, C, K) of chunks of `size` tokens, not yet decayed."""
    reads = to_chunks(torch.cat([q, k], -1), size).unflatten(-1, (2, -1)).flatten(2, 3)
    return reads, to_chunks(beta[..., None] * k, size)


def to_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, K) to (N, BH, C, K); the last chunk is filled up with 0."""
    length = x.shape[1]
    count = -(-length // size)
    x = F.pad(x, (0, 0, 0, 0, 0, count * size - length)) if length % size else x
    return x.unflatten(1, (count, size)).permute(1, 0, 3, 2, 4).contiguous().flatten(1, 2)


def from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """(N, BH, C, V) to (B, T, H, V), with B, T and H those of `like`."""
    batch, length, heads, _ = like.shape
    x = x.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)
    return x.reshape(batch, -1, heads, x.shape[-1])[:, :length]


def wide(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return x.float() if x.element_size() < 4 else x


def bidirectional(
    rule: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    reverse: tuple[Tensor | None, ...],
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """y = f(x) + flip(f(flip x)) - f1(x), both directions as one batch; f1(x) = scale beta (q . k) v.

    Args:
        rule: f, the causal operator of q, k, v and the gates.
        q, k, v: as for f.
        gates: (decay and) beta; beta comes last.
        reverse: those of the other direction, in original time order; None means the same.
        mask: (B, T) bool, True for real tokens, which come first.
        scale: of the output.
    Returns:  (B, T, H, V).
    """
    other = [g if r is None else r for g, r in zip(gates, reverse, strict=True)]
    if mask is not None:
        # Read backwards, padding comes first: with strength 0 it writes nothing, without decay it costs no digits.
        other = [g.masked_fill(~mask.view(*mask.shape, *(1,) * (g.ndim - 2)), 0.0) for g in other]
    both = (torch.cat([x, r.flip(1)]) for x, r in zip((q, k, v, *gates), (q, k, v, *other), strict=True))
    forward, backward = rule(*both, scale=scale).chunk(2)
    o = forward + backward.flip(1) - (q * k).sum(-1, keepdim=True) * (scale * gates[-1][..., None]) * v
    return o if mask is None else o.masked_fill(~mask[..., None, None], 0.0)
