"""The recurrence of the selective scan in tiles that fit the processor's cache, with a backward pass of its own.

    h_t = exp(dt_t A) * h_(t-1) + B_t x_t,   x = dt * u,   y_t = C_t h_t

A is [N, D] here and the state (N, D), so that channels lie side by side in memory. The scan has two levels: a row is
cut into chunks of C tokens. A loop over the C positions, all chunks of a tile at once, gives what each chunk adds to
the state; a loop over the chunks carries the state; a second loop over positions starts every chunk from its true
state. Only products of decays occur, never quotients: strong decay underflows to 0 and nothing overflows.

There are N D states a token, each of which a step reads and writes, so memory traffic is the cost, and a tile goes
through all steps before the next one begins. Kept for the backward pass are the states between chunks, N D / C numbers
a token; it computes the others again, and runs the adjoint recurrence from the last token to the first:

    g_t = C_t dy_t + exp(dt_(t+1) A) * g_(t+1),    dB_t = g_t x_t,    dx_t = B_t g_t,    dC_t = dy_t h_t
    q_t = g_t * exp(dt_t A) * h_(t-1),             dA = sum_t dt_t q_t,    d dt_t = sum_n A q_t + u_t dx_t
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from frankenstein.kernels import selective_scan_cpu
from frankenstein.kernels.native import available
from frankenstein.mixers.base import at_once

CHUNK = 16  # C
GPU_CHUNK = 64  # there a step costs a launch: C steps, and T / C between chunks
TILE_CHANNELS = 512
TILE_STATES = 2**19  # numbers in each buffer of a tile
LOG2_E = 1 / math.log(2)  # exp2 is the faster exponential on CPU


def tiled_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The recurrence above, in time and memory linear in T; float32 goes to the kernels where they can run.

    Args:
        u, dt: (B, T, D).
        A: (D, N).
        B, C: (B, T, N).
        reverse: read from the last token to the first.
    Returns:  y (B, T, D), last state (B, D, N).
    """
    if u.is_cuda and u.dtype == torch.float32 and find_spec("triton") is not None:
        from frankenstein.kernels.selective_scan import scan

        return scan(u, dt, A, B, C, reverse=reverse)
    if u.is_cpu and u.dtype == torch.float32 and available(selective_scan_cpu.NAME):
        return selective_scan_cpu.scan(u, dt, A, B, C, reverse=reverse)
    tensors = (x.contiguous() for x in (u, dt, A.mT, B, C))
    y, last = _TiledScan.apply(*tensors, reverse, torch.is_grad_enabled())
    return y, last.mT


class _TiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool, keep: bool
    ) -> tuple[Tensor, Tensor]:
        rows, length, _ = u.shape
        y, last = torch.empty_like(u), u.new_zeros(rows, *A.shape)
        starts = u.new_empty(rows, -(-length // _chunk(u)) if keep else 0, *A.shape)
        work = _Workspace(u, 2, reverse)
        with torch.autocast(u.device.type, enabled=False):
            for strip in _strips(u, len(A)):
                for tile in strip[::-1] if reverse else strip:
                    w, step, state = work.on(tile), tile.tokens_of(dt), tile.state_of(last)
                    w.fill(step, step * tile.tokens_of(u), tile.weights_of(B), tile.rates_of(A))
                    w.start_chunks(state)
                    if keep:
                        tile.starts_of(starts).copy_(w.start)
                    state.copy_(w.run(w.start))
                    tile.tokens_of(y).copy_(_over_states(tile.weights_of(C), w.state))
        ctx.reverse = reverse
        ctx.save_for_backward(u, dt, A, B, C, starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, starts = ctx.saved_tensors
        dy = dy.contiguous()
        du, d_dt, d_last = torch.empty_like(u), torch.empty_like(dt), d_last.clone()
        dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        work = _Workspace(u, 3, ctx.reverse)
        with torch.autocast(u.device.type, enabled=False):
            for strip in _strips(u, len(A)):
                for tile in strip if ctx.reverse else strip[::-1]:
                    w, start, rates = work.on(tile), tile.starts_of(starts), tile.rates_of(A)
                    v, step, d_out = (tile.tokens_of(x) for x in (u, dt, dy))
                    x = step * v
                    w.fill(step, x, tile.weights_of(B), rates)
                    w.run(start)
                    tile.weights_of(dC).add_(_over_channels(d_out, w.state))
                    torch.mul(tile.weights_of(C)[..., None], d_out[:, :, None], out=w.gradient)
                    d_state = tile.state_of(d_last)
                    w.end_chunks(d_state)
                    d_rates, before = w.run_back(start, step)
                    tile.rates_of(dA).add_(d_rates)
                    d_state.copy_(before)
                    dx = _over_states(tile.weights_of(B), w.gradient)
                    tile.weights_of(dB).add_(_over_channels(x, w.gradient))
                    tile.tokens_of(du).copy_(dx * step)
                    tile.tokens_of(d_dt).copy_(w.decay.mul_(rates).sum(2).addcmul_(dx, v))
        return du, d_dt, dA, dB, dC, None, None


def _over_states(weights: Tensor, states: Tensor) -> Tensor:
    """(R, S, E): sum over N of weights (R, S, N) times states (R, S, N, E)."""
    return (weights[:, :, None] @ states)[:, :, 0]


def _over_channels(x: Tensor, states: Tensor) -> Tensor:
    """(R, S, N): sum over E of x (R, S, E) times states (R, S, N, E)."""
    return (x[:, :, None] @ states.mT)[:, :, 0]


@dataclass(frozen=True)
class _Tile:
    """What is computed at once: R rows, G chunks of L tokens (S = G L) and E channels; shape is (R, G, L, N, E).

    `chunk` is C; L is less in the last tile only.
    """

    rows: slice
    tokens: slice
    channels: slice
    shape: tuple[int, int, int, int, int]
    chunk: int

    def tokens_of(self, x: Tensor) -> Tensor:
        """(R, S, E) of (B, T, D)."""
        return x[self.rows, self.tokens, self.channels]

    def weights_of(self, x: Tensor) -> Tensor:
        """(R, S, N) of (B, T, N)."""
        return x[self.rows, self.tokens]

    def rates_of(self, x: Tensor) -> Tensor:
        """(N, E) of (N, D)."""
        return x[:, self.channels]

    def state_of(self, x: Tensor) -> Tensor:
        """(R, N, E) of (B, N, D)."""
        return x[self.rows, :, self.channels]

    def starts_of(self, x: Tensor) -> Tensor:
        """(R, G, N, E) of (B, T / C, N, D)."""
        first = self.tokens.start // self.chunk
        return x[self.rows, first : first + self.shape[1], :, self.channels]


def _chunk(x: Tensor) -> int:
    """C on the device of x."""
    return CHUNK if x.is_cpu else GPU_CHUNK


def _strips(u: Tensor, state_size: int) -> Iterator[list[_Tile]]:
    """Lists of tiles: those of one list follow each other in time, different lists are independent."""
    (rows, length, width), chunk = u.shape, _chunk(u)
    wide = min(width, TILE_CHANNELS) if u.is_cpu else width
    tokens = max(chunk, at_once(u, TILE_STATES) // (state_size * wide))
    high = max(1, min(rows, tokens // length))
    for row in range(0, rows, high):
        for channel in range(0, width, wide):
            r, e = slice(row, min(row + high, rows)), slice(channel, min(channel + wide, width))
            yield [
                _Tile(r, slice(t, t + n * size), e, (r.stop - row, n, size, state_size, e.stop - channel), chunk)
                for t, n, size in _cut(length, chunk, tokens // chunk)
            ]


def _cut(length: int, chunk: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(first token, chunks, tokens a chunk): at most so many whole chunks at once, and one with the rest."""
    whole, rest = divmod(length, chunk)
    for n in range(0, whole, most):
        yield n * chunk, min(most, whole - n), chunk
    if rest:
        yield whole * chunk, 1, rest


class _Workspace:
    """The buffers of one call. Tiles of the same shape share them: fresh memory costs more than the arithmetic."""

    def __init__(self, like: Tensor, count: int, reverse: bool) -> None:
        self.like, self.count, self.reverse = like, count, reverse
        self.buffers: dict[tuple[int, ...], _Buffers] = {}

    def on(self, tile: _Tile) -> "_Buffers":
        """The buffers for a tile; what they held is lost."""
        if tile.shape not in self.buffers:
            self.buffers[tile.shape] = _Buffers(self.like, tile.shape, self.count, self.reverse)
        return self.buffers[tile.shape]


class _Buffers:
    """What a tile is computed in.

    `decay`, `state` and `gradient` are (R, S, N, E); `start` (what enters a chunk), `end` (what it gives) and `total`
    (its whole decay) are (R, G, N, E). The lists `*_at` are views in the order of the scan: of the first three a
    position each, (R, G, N, E), of the last three a chunk each, (R, N, E). With two buffers, `gradient` is `state`.
    """

    def __init__(self, like: Tensor, shape: tuple[int, int, int, int, int], count: int, reverse: bool) -> None:
        rows, chunks, _, *state = shape
        self.lanes, self.reverse = shape[1:3], reverse
        whole = [like.new_empty(shape) for _ in range(count)]
        self.decay, self.state, self.gradient = (whole[i].flatten(1, 2) for i in (0, 1, -1))
        self.decay_at, self.state_at, self.gradient_at = (self._split(whole[i], 2) for i in (0, 1, -1))
        self.start, self.end, self.total = small = [like.new_empty(rows, chunks, *state) for _ in range(3)]
        self.start_at, self.end_at, self.total_at = (self._split(x, 1) for x in small)

    def _split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        parts = x.unbind(dim)
        return parts[::-1] if self.reverse else parts

    def fill(self, step: Tensor, x: Tensor, B: Tensor, rates: Tensor) -> None:
        """Decay of every token, what it writes (into `state`), and the decay of every chunk."""
        rates = rates * LOG2_E
        torch.mul(step[:, :, None], rates, out=self.decay).exp2_()
        torch.mul(B[..., None], x[:, :, None], out=self.state)
        if self.lanes[0] > 1:
            torch.mul(step.unflatten(1, self.lanes).sum(2)[:, :, None], rates, out=self.total).exp2_()

    def start_chunks(self, state: Tensor) -> None:
        """Set `start` to the true state before every chunk, from that before the tile."""
        self.start_at[0].copy_(state)
        if self.lanes[0] > 1:
            self.end.copy_(self.state_at[0])
            for decay, written in zip(self.decay_at[1:], self.state_at[1:], strict=True):
                torch.addcmul(written, decay, self.end, out=self.end)
            _carry(self.start_at, self.end_at, self.total_at)

    def run(self, start: Tensor) -> Tensor:
        """Turn what is written into states; returns the last one (R, N, E)."""
        before = start
        for decay, state in zip(self.decay_at, self.state_at, strict=True):
            before = torch.addcmul(state, decay, before, out=state)
        return self._split(before, 1)[-1]

    def end_chunks(self, d_state: Tensor) -> None:
        """Set `start` to the gradient of the state after every chunk, from that of the state after the tile."""
        self.start_at[-1].copy_(d_state)
        if self.lanes[0] > 1:
            self.end.copy_(self.gradient_at[-1])
            for decay, own in zip(self.decay_at[:0:-1], self.gradient_at[-2::-1], strict=True):
                torch.addcmul(own, decay, self.end, out=self.end)
            self.end.mul_(self.decay_at[0])
            _carry(self.start_at[::-1], self.end_at[::-1], self.total_at[::-1])

    def run_back(self, start: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Complete `gradient` and turn `decay` into q; returns the gradients of A and of the state before the tile."""
        steps = self._split(step.unflatten(1, self.lanes)[:, :, :, None], 2)
        d_rates = self.end.zero_()
        self.gradient_at[-1].add_(self.start)
        for i in reversed(range(len(steps))):
            q = self.decay_at[i].mul_(self.gradient_at[i])  # the gradient of the state before, through the decay
            if i:
                self.gradient_at[i - 1].add_(q)
                q.mul_(self.state_at[i - 1])
            else:
                self.start.copy_(q)
                q.mul_(start)
            d_rates.addcmul_(q, steps[i])
        return d_rates.sum((0, 1)), self.start_at[0]


def _carry(start: Sequence[Tensor], end: Sequence[Tensor], total: Sequence[Tensor]) -> None:
    """start of a chunk = end of the one before + its decay * its start."""
    for j in range(1, len(start)):
        torch.addcmul(end[j - 1], total[j - 1], start[j - 1], out=start[j])
