"""Titans' linear memory on a CPU, in C (`titans_memory.c`, where the equations stand)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.kernels.native import constant, loaded, pointer, sizes

NAME = "titans_memory"


def memory(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor | None, *, both_ways: bool
) -> tuple[Tensor, Tensor]:
    """As `scan_blocks` with chunks of one token, for float32 on a CPU.

    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        gates: (3, B, T, H), w = 2 theta, 1 - alpha and eta; (6, B, T, H) where the reverse direction has its own.
        state: (B H, 2 K, V), M above S before the first token, in one direction; None means 0.
    Returns:  output (B, T, H, V), both ways f(x) + flip(f(flip x)) - w (q . k) v; last state (B H, 2 K, V).
    """
    width = v.shape[-1]
    extra = -width % constant("lanes", NAME)
    if state is None:
        state = q.new_zeros(q.shape[0] * q.shape[2], 2 * q.shape[3], width)
    if extra:
        v, state = F.pad(v, (0, extra)), F.pad(state, (0, extra))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates, state))
    o, last, _ = _forward(*(x.contiguous() for x in (q, k, v, gates, state)), both_ways, keep)
    return (o[..., :width], last[..., :width]) if extra else (o, last)


def _sizes(q: Tensor, v: Tensor, gates: Tensor, both_ways: bool) -> list[Any]:
    return sizes(*q.shape, v.shape[-1], 2 if both_ways else 1, len(gates))


def _starts(q: Tensor, state: Tensor, both_ways: bool, keep: bool) -> Tensor:
    """(directions, chunks, B H, 2 K, V) that enter the chunks; empty if there is no backward pass."""
    chunks = -(-q.shape[1] // constant("chunk", NAME)) if keep else 0
    return q.new_empty(2 if both_ways else 1, chunks, *state.shape)


@torch.library.custom_op("frankenstein::titans_memory", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor, both_ways: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state (of the last direction) and, for the backward pass, the states that enter the chunks.

    V is a multiple of the kernel's lanes.
    """
    o, last, starts = torch.empty_like(v), state.clone(), _starts(q, state, both_ways, keep)
    tensors = (q, k, v, gates, o, last, starts if keep else None)
    loaded(NAME).memory_forward(*map(pointer, tensors), *_sizes(q, v, gates, both_ways))
    return o, last, starts


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor, both_ways: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state), _starts(q, state, both_ways, keep)


@torch.library.custom_op("frankenstein::titans_memory_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Tensor, d_o: Tensor, d_last: Tensor, both_ways: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gates and the first state."""
    grads = [torch.zeros_like(x) for x in (q, k, v, gates)]
    d_state = torch.zeros_like(d_last) if both_ways else d_last.clone(memory_format=torch.contiguous_format)
    work = q.new_empty(torch.get_num_threads(), 2 * (constant("chunk", NAME) + 1) * q.shape[-1] * v.shape[-1])
    tensors = (q, k, v, gates, starts, d_o, *grads, d_state, work)
    loaded(NAME).memory_backward(*map(pointer, tensors), *_sizes(q, v, gates, both_ways))
    d_q, d_k, d_v, d_gates = grads
    return d_q, d_k, d_v, d_gates, d_state


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Tensor, d_o: Tensor, d_last: Tensor, both_ways: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (q, k, v, gates, d_last))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gates, _, ctx.both_ways, _ = inputs
    ctx.save_for_backward(q, k, v, gates, output[2])
    ctx.set_materialize_grads(False)  # the zeros of an unused gradient, as large as the kept states, take time


def _differentiate(ctx: Any, d_o: Tensor | None, d_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    d_o = torch.zeros_like(tensors[2]) if d_o is None else d_o.contiguous()
    d_last = starts.new_zeros(starts.shape[2:]) if d_last is None else d_last
    return *_backward(*tensors, starts, d_o, d_last, ctx.both_ways), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
