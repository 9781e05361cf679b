"""The recurrence of the selective scan on a CPU, in C (`selective_scan.c`); its equations stand in `tiled_scan.py`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.kernels.native import constant, loaded, pointer, sizes

NAME = "selective_scan"
LOG2_E = 1 / math.log(2)


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """As `tiled_scan`, for float32 on a CPU.

    Args:
        u, dt: (B, T, D).
        A: (D, N).
        B, C: (B, T, N).
        reverse: read from the last token to the first.
    Returns:  y (B, T, D), last state (B, D, N).
    """
    width = u.shape[2]
    extra = -width % constant("lanes", NAME)
    if extra:
        u, dt, A = F.pad(u, (0, extra)), F.pad(dt, (0, extra)), F.pad(A, (0, 0, 0, extra))
    rates = A.mT.contiguous() * LOG2_E
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (u, dt, A, B, C))
    y, last, _ = _forward(*(x.contiguous() for x in (u, dt, rates, B, C)), reverse, keep)
    return (y[..., :width], last.mT[:, :width]) if extra else (y, last.mT)


@torch.library.custom_op("frankenstein::selective_scan", mutates_args=())
def _forward(
    u: Tensor, dt: Tensor, rates: Tensor, B: Tensor, C: Tensor, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, T, D), last state (B, N, D) and, for the backward pass, the states that enter the chunks."""
    (rows, length, width), states = u.shape, len(rates)
    y, last, starts = _empty_results(u, rates, _chunks(length) if keep else 0)
    tensors = (u, dt, rates, B, C, y, last, starts if keep else None)
    loaded(NAME).scan_forward(*map(pointer, tensors), *sizes(rows, length, width, states, int(reverse)))
    return y, last, starts


@_forward.register_fake
def _(
    u: Tensor, dt: Tensor, rates: Tensor, B: Tensor, C: Tensor, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(u, rates, _chunks(u.shape[1]) if keep else 0)


def _chunks(length: int) -> int:
    return -(-length // constant("chunk", NAME))


def _empty_results(u: Tensor, rates: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    state = rates.shape
    return torch.empty_like(u), u.new_empty(len(u), *state), u.new_empty(len(u), chunks, *state)


@torch.library.custom_op("frankenstein::selective_scan_backward", mutates_args=())
def _backward(
    u: Tensor,
    dt: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    dy: Tensor,
    d_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, rates, B and C."""
    (rows, length, width), states = u.shape, len(rates)
    strips = -(-width // constant("strip", NAME))
    du, d_dt, d_rates = torch.empty_like(u), torch.empty_like(dt), u.new_zeros(rows, states, width)
    d_state = d_last.clone(memory_format=torch.contiguous_format)  # the kernel ends with that of the first state
    dB, dC = (u.new_empty(strips, *B.shape) for _ in range(2))
    work = u.new_empty(torch.get_num_threads(), 2 * constant("chunk", NAME) * states * constant("lanes", NAME))
    tensors = (u, dt, rates, B, C, starts, dy, d_state, du, d_dt, d_rates, dB, dC, work)
    loaded(NAME).scan_backward(*map(pointer, tensors), *sizes(rows, length, width, states, int(reverse)))
    return du, d_dt, d_rates.sum(0) / LOG2_E, dB.sum(0), dC.sum(0)


@_backward.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    dy: Tensor,
    d_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (u, dt, rates, B, C))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # the zeros of an unused gradient, as large as the kept states, take time


def _differentiate(ctx: Any, dy: Tensor | None, d_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    u, dt, rates, B, C, starts = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    d_last = starts.new_zeros(len(u), *rates.shape) if d_last is None else d_last
    return *_backward(u, dt, rates, B, C, starts, dy.contiguous(), d_last, ctx.reverse), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
