"""The recurrence of the selective scan on a GPU, in Triton; its equations stand in `mixers/tiled_scan.py`.

A row is cut into chunks of C tokens, which run beside each other: each gives what it adds to the state and its whole
decay, one pass over the chunks carries the state, and each runs once more from its true state. States live in
registers. The backward pass does the same from the last token to the first; a chunk there first writes its own states
to memory, from where it reads them in reverse.
Only products of decays occur, never quotients. Sums over channels are added up block by block in a fixed order, so that
the same tensors give the same bits.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # C
CHANNELS = 32  # of a program, one for each thread of a warp
STATES = 1 << 27  # numbers of the backward pass's own states that are in memory at once: 512 MB
LOG2_E = tl.constexpr(1 / math.log(2))


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """As `tiled_scan`, for float32 on a GPU.

    Args:
        u, dt: (B, T, D).
        A: (D, N).
        B, C: (B, T, N).
        reverse: read from the last token to the first.
    Returns:  y (B, T, D), last state (B, D, N).
    """
    y, last = _Scan.apply(*(x.contiguous() for x in (u, dt, A, B, C)), reverse)
    return y, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        (rows, length, width), states = u.shape, A.shape[1]
        chunks = -(-length // CHUNK)
        starts, totals = u.new_empty(rows, chunks, width, states), u.new_empty(rows, chunks, width)
        y, last = torch.empty_like(u), u.new_zeros(rows, width, states)
        sizes, fixed = (length, width, states, chunks), _fixed(states, reverse)
        grid = (triton.cdiv(width, CHANNELS), chunks, rows)
        _add_chunks[grid](u, dt, A, B, starts, totals, *sizes, **fixed)
        _carry[grid[::2]](A, totals, starts, last, width, states, chunks, BACK=False, **fixed)
        _read_chunks[grid](u, dt, A, B, C, starts, y, *sizes, **fixed)
        ctx.save_for_backward(u, dt, A, B, C, starts, totals)
        ctx.reverse = reverse
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, starts, totals = ctx.saved_tensors
        (rows, length, width), states = u.shape, A.shape[1]
        chunks, blocks = totals.shape[1], triton.cdiv(width, CHANNELS)
        dy, sizes, fixed = dy.contiguous(), (length, width, states, chunks), _fixed(states, ctx.reverse)
        ends, before = torch.empty_like(starts), d_last.float().contiguous().clone()
        _add_chunks_back[blocks, chunks, rows](dt, A, C, dy, ends, *sizes, **fixed)
        _carry[blocks, rows](A, totals, ends, before, width, states, chunks, BACK=True, **fixed)
        du, d_dt = torch.empty_like(u), torch.empty_like(dt)
        dA = torch.empty_like(starts)
        dB, dC = (u.new_empty(blocks, *B.shape) for _ in range(2))
        at_once = max(1, STATES // (rows * chunks * CHUNK * CHANNELS * fixed["BLOCK_N"]))
        own = u.new_empty(min(at_once, blocks), rows, chunks, CHUNK, CHANNELS * fixed["BLOCK_N"])
        for first in range(0, blocks, at_once):
            grid = (min(at_once, blocks - first), chunks, rows)
            _gradients[grid](
                u, dt, A, B, C, dy, starts, ends, own, du, d_dt, dA, dB, dC, first, rows, *sizes, **fixed
            )  # fmt: skip
        return du, d_dt, dA.sum((0, 1)), dB.sum(0), dC.sum(0), None


def _fixed(states: int, reverse: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    size = triton.next_power_of_2(states)
    return {"CHUNK": CHUNK, "BLOCK_D": CHANNELS, "BLOCK_N": size, "REVERSE": reverse, "num_warps": 1}


@triton.jit
def _rates(A, channel, state, width, states):
    """(BLOCK_D, BLOCK_N) of A; 0 outside."""
    inside = (channel < width)[:, None] & (state < states)[None, :]
    return tl.load(A + channel[:, None] * states + state[None, :], mask=inside, other=0.0)


@triton.jit
def _token(step, row, length, REVERSE: tl.constexpr):
    """Place of a step of the scan among all tokens; steps after the last are at the last, and are masked."""
    step = tl.minimum(step, length - 1)
    return row.to(tl.int64) * length + (length - 1 - step if REVERSE else step)


@triton.jit
def _inputs(u, dt, B, token, here, channel, state, width, states):
    """dt and u (BLOCK_D,) and B (BLOCK_N,) of a token; 0 outside."""
    size = tl.load(dt + token * width + channel, mask=here, other=0.0)
    value = tl.load(u + token * width + channel, mask=here, other=0.0)
    return size, value, tl.load(B + token * states + state, mask=state < states, other=0.0)


@triton.jit
def _add_chunks(
    u, dt, A, B, ends, totals, length, width, states, chunks,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to the state, and its sum of dt."""
    chunk, row = tl.program_id(1), tl.program_id(2)
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    rate = _rates(A, channel, state, width, states) * LOG2_E
    h, total = tl.zeros((BLOCK_D, BLOCK_N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for i in range(CHUNK):
        step = chunk * CHUNK + i
        token = _token(step, row, length, REVERSE)
        here = channel < tl.where(step < length, width, 0)
        size, value, into = _inputs(u, dt, B, token, here, channel, state, width, states)
        h = tl.exp2(size[:, None] * rate) * h + (size * value)[:, None] * into[None, :]
        total += size
    place = (row.to(tl.int64) * chunks + chunk) * width + channel
    inside = (channel < width)[:, None] & (state < states)[None, :]
    tl.store(ends + place[:, None] * states + state[None, :], h, mask=inside)
    tl.store(totals + place, total, mask=channel < width)


@triton.jit
def _carry(
    A, totals, ends, last, width, states, chunks,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Puts the state that enters each chunk in the place of what the chunk adds; `last` is the first and last state.

    BACK: from the last chunk to the first, the gradient of the state.
    """
    row = tl.program_id(1)
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (channel < width)[:, None] & (state < states)[None, :]
    rate = _rates(A, channel, state, width, states) * LOG2_E
    whole = last + (row.to(tl.int64) * width + channel)[:, None] * states + state[None, :]
    h = tl.load(whole, mask=inside, other=0.0)
    for i in range(chunks):
        chunk = chunks - 1 - i if BACK else i
        place = (row.to(tl.int64) * chunks + chunk) * width + channel
        total = tl.load(totals + place, mask=channel < width, other=0.0)
        here = ends + place[:, None] * states + state[None, :]
        added = tl.load(here, mask=inside, other=0.0)
        tl.store(here, h, mask=inside)
        h = tl.exp2(total[:, None] * rate) * h + added
    tl.store(whole, h, mask=inside)


@triton.jit
def _read_chunks(
    u, dt, A, B, C, starts, y, length, width, states, chunks,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The outputs of every chunk, from the state that enters it."""
    chunk, row = tl.program_id(1), tl.program_id(2)
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (channel < width)[:, None] & (state < states)[None, :]
    rate = _rates(A, channel, state, width, states) * LOG2_E
    place = (row.to(tl.int64) * chunks + chunk) * width + channel
    h = tl.load(starts + place[:, None] * states + state[None, :], mask=inside, other=0.0)
    for i in range(CHUNK):
        step = chunk * CHUNK + i
        token = _token(step, row, length, REVERSE)
        here = channel < tl.where(step < length, width, 0)
        size, value, into = _inputs(u, dt, B, token, here, channel, state, width, states)
        out = tl.load(C + token * states + state, mask=state < states, other=0.0)
        h = tl.exp2(size[:, None] * rate) * h + (size * value)[:, None] * into[None, :]
        tl.store(y + token * width + channel, tl.sum(h * out[None, :], 1), mask=here)


@triton.jit
def _add_chunks_back(
    dt, A, C, dy, ends, length, width, states, chunks,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What every chunk's own outputs add to the gradient of the state that enters it."""
    chunk, row = tl.program_id(1), tl.program_id(2)
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    rate = _rates(A, channel, state, width, states) * LOG2_E
    e = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for i in range(CHUNK):
        step = chunk * CHUNK + CHUNK - 1 - i
        token = _token(step, row, length, REVERSE)
        here = channel < tl.where(step < length, width, 0)
        size = tl.load(dt + token * width + channel, mask=here, other=0.0)
        d_out = tl.load(dy + token * width + channel, mask=here, other=0.0)
        out = tl.load(C + token * states + state, mask=state < states, other=0.0)
        e = tl.exp2(size[:, None] * rate) * (e + d_out[:, None] * out[None, :])
    place = (row.to(tl.int64) * chunks + chunk) * width + channel
    inside = (channel < width)[:, None] & (state < states)[None, :]
    tl.store(ends + place[:, None] * states + state[None, :], e, mask=inside)


@triton.jit
def _gradients(
    u, dt, A, B, C, dy, starts, ends, own, du, d_dt, dA, dB, dC, first, rows, length, width, states, chunks,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk; those of A by chunk and those of B and C by block of channels, to be added up."""
    chunk, row, block = tl.program_id(1), tl.program_id(2), first + tl.program_id(0)
    channel, state = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (channel < width)[:, None] & (state < states)[None, :]
    rate = _rates(A, channel, state, width, states)
    place = (row.to(tl.int64) * chunks + chunk) * width + channel
    h = tl.load(starts + place[:, None] * states + state[None, :], mask=inside, other=0.0)
    program = (tl.program_id(0).to(tl.int64) * rows + row) * chunks + chunk
    tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + state[None, :]
    mine = own + program * (CHUNK * BLOCK_D * BLOCK_N) + tile
    for i in range(CHUNK):
        step = chunk * CHUNK + i
        token = _token(step, row, length, REVERSE)
        here = channel < tl.where(step < length, width, 0)
        size, value, into = _inputs(u, dt, B, token, here, channel, state, width, states)
        tl.store(mine + i * (BLOCK_D * BLOCK_N), h)
        h = tl.exp2(size[:, None] * (rate * LOG2_E)) * h + (size * value)[:, None] * into[None, :]
    tl.debug_barrier()
    e = tl.load(ends + place[:, None] * states + state[None, :], mask=inside, other=0.0)
    d_rate = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for j in range(CHUNK):
        i = CHUNK - 1 - j
        step = chunk * CHUNK + i
        token = _token(step, row, length, REVERSE)
        here = channel < tl.where(step < length, width, 0)
        size, value, into = _inputs(u, dt, B, token, here, channel, state, width, states)
        d_out = tl.load(dy + token * width + channel, mask=here, other=0.0)
        out = tl.load(C + token * states + state, mask=state < states, other=0.0)
        kept = tl.exp2(size[:, None] * (rate * LOG2_E)) * tl.load(mine + i * (BLOCK_D * BLOCK_N))
        x = size * value
        g = e + d_out[:, None] * out[None, :]
        e = tl.exp2(size[:, None] * (rate * LOG2_E)) * g
        q = g * kept
        dx = tl.sum(g * into[None, :], 1)
        d_rate += size[:, None] * q
        tl.store(du + token * width + channel, dx * size, mask=here)
        tl.store(d_dt + token * width + channel, tl.sum(q * rate, 1) + value * dx, mask=here)
        partial = (block.to(tl.int64) * rows * length + token) * states + state
        real = state < tl.where(step < length, states, 0)
        tl.store(dB + partial, tl.sum(g * x[:, None], 0), mask=real)
        tl.store(dC + partial, tl.sum((kept + x[:, None] * into[None, :]) * d_out[:, None], 0), mask=real)
    tl.store(dA + place[:, None] * states + state[None, :], d_rate, mask=inside)
