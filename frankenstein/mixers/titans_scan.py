"""One direction of Titans' memory over blocks, with its gradient by hand; the equations are in titans_blocks.py.

Shapes: n blocks of C tokens, R = B H rows, N = n R; a state is M above S, (R, 2 K, V).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from frankenstein.mixers.titans_gates import Gates, Order, coefficients, coefficients_backward

# Rows x tokens computed at once on a CPU: temporaries of this size stay in its caches.
SEGMENT = 1 << 12


class Plan(NamedTuple):
    """How a sequence is cut and read.

    size: C. chunk_size: tokens whose errors are taken at the memory before the first of them; C is a multiple.
    length: T. both_ways: in both directions, in chunks of 1.
    """

    size: int
    chunk_size: int
    length: int
    both_ways: bool

    @property
    def blocks(self) -> int:
        """n."""
        return -(-self.length // self.size)


class Inputs(NamedTuple):
    """What both directions share.

    reads: (N, 2 C, K), the queries of a block over its keys; k, v: (N, C, K) and (N, C, V); dots: (N, 2 C, C), the dot
    products of reads with keys.
    """

    reads: Tensor
    k: Tensor
    v: Tensor
    dots: Tensor


class Kept(NamedTuple):
    """What the backward pass of a direction needs; see titans_gates.py for the coefficients, (C + 1, N, C + 2) each.

    inverse: (N, C, C), of the triangular system; errors: (N, C, V); states: (n + 1, R, 2 K, V), state b between the
    blocks b - 1 and b; where the first and the last one are 0 or not needed, they are not filled.
    """

    memory: Tensor
    momentum: Tensor
    inverse: Tensor
    errors: Tensor
    states: Tensor


class _Factors(NamedTuple):
    """Coefficients as they are used.

    seen: (N, 2 C, C + 2), how much of the writes, of M_0 and of S_0 queries and keys see. ends: (N, C + 2, 2), how much
    of the same is in the last M and in the last S.
    """

    seen: Tensor
    ends: Tensor


class _Part(NamedTuple):
    """Blocks in a row; those of them before which there is a state, and those after which it is needed."""

    blocks: range
    reads: range
    writes: range


class Direction:
    """One direction; stateful if its first state counts and its last one is needed, which is for forward only."""

    def __init__(self, x: Inputs, gates: Gates, order: Order, plan: Plan, *, stateful: bool) -> None:
        self.x, self.gates, self.order, self.plan, self.stateful = x, gates, order, plan, stateful
        self.rows = len(x.k) // plan.blocks

    def forward(self, o: Tensor, state: Tensor | None) -> Kept:
        """Adds the output to `o`."""
        x, size, (memory, momentum) = self.x, self.plan.size, coefficients(self.gates, self.order)
        factors = self._factors(memory, momentum)
        gram = factors.seen[..., :-2] * x.dots
        states = o.new_empty(self.plan.blocks + 1, self.rows, 2 * x.k.shape[-1], o.shape[-1])
        if state is not None:
            states[0] = state
        kept = Kept(memory, momentum, _inverse(gram[:, size:], self.order), torch.empty_like(x.v), states)
        for part in self._parts():
            reads = self._rows(part.reads)
            twice = _twice(x.reads[reads], factors.seen[reads, :, -2:])
            self._scan(part, kept, factors, twice[:, size:])
            if part.reads:
                o[reads].baddbmm_(twice[:, :size], self._old(states, part.reads))
        o.baddbmm_(gram[:, :size], kept.errors)
        return kept

    def _scan(self, part: _Part, kept: Kept, factors: _Factors, compare: Tensor) -> None:
        """Fills the errors and the states; `compare` are the keys (r, C, 2 K) as they meet M_0 and S_0."""
        compares, written = self._by_block(compare, part.reads), self._written(part, factors.ends)
        decay, mix = self._decays(factors.ends)
        values, errors, inverse = (x.split(self.rows) for x in (self.x.v, kept.errors, kept.inverse))
        states, halves = kept.states.unbind(), _halves(kept.states).unbind()
        for b in self._steps(part):
            old, new = self._around(b)
            value = values[b]
            if b in part.reads:
                value = torch.baddbmm(value, compares[b], states[old], alpha=-1)
            torch.bmm(inverse[b], value, out=errors[b])
            if b in part.reads and b in part.writes:
                torch.mul(decay[b], halves[old], out=halves[new])
                halves[new][:, 0].addcmul_(mix[b], halves[old][:, 1])
                states[new].baddbmm_(written[b].mT, errors[b])
            elif b in part.writes:
                torch.bmm(written[b].mT, errors[b], out=states[new])

    def backward(self, kept: Kept, d_o: Tensor, d_last: Tensor | None, d_x: Inputs) -> tuple[Tensor, Tensor | None]:
        """Adds to `d_x`; the gradients (3, C, N) of the gates, and that of the first state."""
        factors = self._factors(kept.memory, kept.momentum)
        d_factors = _Factors(torch.empty_like(factors.seen), torch.zeros_like(factors.ends))
        d_factors.seen[..., -2:] = 0  # of M_0 and S_0, for blocks before which there is none
        d_state = d_last
        for part in reversed(self._parts()):
            d_state = self._part_backward(part, kept, factors, (d_o, d_state), d_x, d_factors)
        d_coefficients = self._coefficients_of(d_factors)
        d_gates = coefficients_backward(self.gates, self.order, kept[:2], d_coefficients)
        return d_gates, d_state if self.stateful else None

    def _part_backward(
        self,
        part: _Part,
        kept: Kept,
        factors: _Factors,
        grads: tuple[Tensor, Tensor | None],
        d_x: Inputs,
        d_factors: _Factors,
    ) -> Tensor:
        """From the gradients of the output and of the state after a part, that of the state before it."""
        x, size, (d_o, d_state) = self.x, self.plan.size, grads
        rows, reads = self._rows(part.blocks), self._rows(part.reads)
        twice = _twice(x.reads[reads], factors.seen[reads, :, -2:])
        d_states = self._states_of(part, kept.states, d_state)
        if part.reads:
            torch.bmm(twice[:, :size].mT, d_o[reads], out=self._old(d_states, part.reads, part.blocks.start))
        d_errors = (factors.seen[rows, :size, :-2] * x.dots[rows, :size]).mT @ d_o[rows]
        d_values = self._scan_backward(part, kept, factors, d_errors, d_states, twice[:, size:])
        d_x.v[rows] += d_values
        d_reads = torch.cat([d_o[rows], d_values.neg_()], 1)
        d_gram = d_reads @ kept.errors[rows].mT
        torch.mul(d_gram, x.dots[rows], out=d_factors.seen[rows, :, :-2])
        d_x.dots[rows].addcmul_(d_gram, factors.seen[rows, :, :-2])
        if part.reads:
            d_seen = d_reads[self._rows(part.reads, part.blocks.start)]
            torch.bmm(d_seen, self._old(kept.states, part.reads).mT, out=twice)
            own, d_own = factors.seen[reads, :, -2:], d_factors.seen[reads, :, -2:]
            _twice_backward(twice, x.reads[reads], own, d_x.reads[reads], d_own)
        self._writes_backward(part, kept, factors.ends, d_states, d_x.k, d_factors.ends)
        return d_states[-1 if self.order.reverse else 0]

    def _scan_backward(
        self, part: _Part, kept: Kept, factors: _Factors, d_errors: Tensor, d_states: Tensor, compare: Tensor
    ) -> Tensor:
        """The gradient of the values, within the part; completes that of the states, which begin with the part's."""
        first = part.blocks.start
        compares, written = self._by_block(compare, part.reads), self._written(part, factors.ends)
        decay, mix = self._decays(factors.ends)
        d_values = torch.empty_like(d_errors)
        d_value, d_error, inverse = (x.split(self.rows) for x in (d_values, d_errors, kept.inverse))
        states, halves = d_states.unbind(), _halves(d_states).unbind()
        for b in reversed(self._steps(part)):
            old, new = self._around(b - first)
            if b in part.writes:
                d_error[b - first].baddbmm_(written[b], states[new])
            torch.bmm(inverse[b].mT, d_error[b - first], out=d_value[b - first])
            if b in part.reads:
                states[old].baddbmm_(compares[b].mT, d_value[b - first], alpha=-1)
            if b in part.reads and b in part.writes:
                halves[old].addcmul_(decay[b], halves[new])
                halves[old][:, 1].addcmul_(mix[b], halves[new][:, 0])
        return d_values

    def _writes_backward(
        self, part: _Part, kept: Kept, ends: Tensor, d_states: Tensor, d_k: Tensor, d_ends: Tensor
    ) -> None:
        """Of what makes the state after a block: keys that are written, M_0 and S_0."""
        first, writes = part.blocks.start, self._rows(part.writes)
        if part.writes:
            d_twice = kept.errors[writes] @ self._new(d_states, part.writes, first).mT
            _twice_backward(d_twice, self.x.k[writes], ends[writes, :-2], d_k[writes], d_ends[writes, :-2])
        blocks = range(max(part.reads.start, part.writes.start), min(part.reads.stop, part.writes.stop))
        if blocks:
            rows, old = self._rows(blocks), _halves(self._old(kept.states, blocks))
            new = _halves(self._new(d_states, blocks, first))
            d_ends[rows, -2, 0] = (old[:, 0] * new[:, 0]).sum((1, 2))
            d_ends[rows, -1] = (old[:, 1:] * new).sum((2, 3))

    def _states_of(self, part: _Part, states: Tensor, after: Tensor | None) -> Tensor:
        """Room for the states around the blocks of a part; `after` is the one after its last block in reading order."""
        found = states.new_empty(len(part.blocks) + 1, *states.shape[1:])
        if after is not None:
            found[0 if self.order.reverse else -1] = after
        return found

    def _by_block(self, x: Tensor, blocks: range) -> dict[int, Tensor]:
        """x (N, ...) of some blocks, by block."""
        return dict(zip(blocks, x.split(self.rows), strict=bool(blocks)))

    def _written(self, part: _Part, ends: Tensor) -> dict[int, Tensor]:
        """Keys as they are written, (R, C, 2 K), by block."""
        writes = self._rows(part.writes)
        return self._by_block(_twice(self.x.k[writes], ends[writes, :-2]), part.writes)

    def _decays(self, ends: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """By block: what is left of M_0 and S_0 in the last M and S, (R, 2, 1, 1), and S_0 in the last M, (R, 1, 1)."""
        decay = ends[:, -2:].diagonal(dim1=1, dim2=2)[..., None, None]
        return decay.split(self.rows), ends[:, -1, 0, None, None].split(self.rows)

    def _factors(self, memory: Tensor, momentum: Tensor) -> _Factors:
        size, reverse = self.plan.chunk_size, self.order.reverse
        after, before = memory[self.order.after], memory[self.order.before]
        if size > 1:
            before = before[::size].repeat_interleave(size, 0)
        ends = torch.stack([x[0 if reverse else -1] for x in (memory, momentum)], -1)
        if self.stateful:
            ends[-self.rows :] = torch.stack([x[self._last, -self.rows :] for x in (memory, momentum)], -1)
        return _Factors(torch.cat([after.transpose(0, 1), before.transpose(0, 1)], 1), ends)

    def _coefficients_of(self, d_factors: _Factors) -> tuple[Tensor, Tensor]:
        """The gradients of the coefficients m and s from those of `_factors`."""
        size, d_ends = self.plan.chunk_size, d_factors.ends
        d_after, d_before = (x.transpose(0, 1) for x in d_factors.seen.chunk(2, 1))
        d_memory, d_momentum = d_after.new_zeros(2, len(d_after) + 1, *d_after.shape[1:])
        d_memory[self.order.after] = d_after
        d_memory[self.order.before][::size] += d_before if size == 1 else d_before.unflatten(0, (-1, size)).sum(1)
        for total, own in zip((d_memory, d_momentum), d_ends.unbind(-1), strict=True):
            if self.stateful:
                total[self._last, -self.rows :] += own[-self.rows :]
                own[-self.rows :] = 0
            total[0 if self.order.reverse else -1] += own
        return d_memory, d_momentum

    @property
    def _last(self) -> int:
        """The row after the last token of the last block."""
        return (self.plan.length - 1) % self.plan.size + 1

    def _parts(self) -> list[_Part]:
        """All blocks in the order of reading."""
        count, reverse = self.plan.blocks, self.order.reverse
        at_once = max(1, SEGMENT // (self.rows * self.plan.size)) if self.x.k.is_cpu else count
        parts = []
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            blocks = later = earlier = range(start, stop)
            if not self.stateful:
                later, earlier = range(max(start, 1), stop), range(start, min(stop, count - 1))
            parts.append(_Part(blocks, *((earlier, later) if reverse else (later, earlier))))
        return parts[::-1] if reverse else parts

    def _steps(self, part: _Part) -> range:
        """The blocks in the order of reading."""
        return part.blocks[::-1] if self.order.reverse else part.blocks

    def _around(self, block: int) -> tuple[int, int]:
        """The places of the states before and after a block."""
        return (block + 1, block) if self.order.reverse else (block, block + 1)

    def _rows(self, blocks: range, first: int = 0) -> slice:
        """The places of blocks among N, counted from the block `first`."""
        return slice((blocks.start - first) * self.rows, (blocks.stop - first) * self.rows)

    def _old(self, states: Tensor, blocks: range, first: int = 0) -> Tensor:
        """The states before blocks, where `states` begin with the one in front of the block `first`."""
        place, _ = self._around(blocks.start - first)
        return states[place : place + len(blocks)].flatten(0, 1)

    def _new(self, states: Tensor, blocks: range, first: int = 0) -> Tensor:
        """The states after blocks."""
        _, place = self._around(blocks.start - first)
        return states[place : place + len(blocks)].flatten(0, 1)


def _inverse(system: Tensor, order: Order) -> Tensor:
    """Of 1 + system, which is strictly triangular: lower, or upper in reverse order."""
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    # From the right, on a transposed view: that is the layout in memory that LAPACK wants, so that nothing is copied.
    return torch.linalg.solve_triangular(system.mT, eye, upper=not order.reverse, left=False, unitriangular=True).mT


def _halves(states: Tensor) -> Tensor:
    """(..., 2 K, V) to (..., 2, K, V): memory and momentum."""
    return states.unflatten(-2, (2, -1))


def _twice(x: Tensor, factors: Tensor) -> Tensor:
    """(N, C, 2 K): x (N, C, K) times each of its two factors (N, C, 2)."""
    width = x.shape[-1]
    both = x.new_empty(*x.shape[:2], 2 * width)
    torch.mul(x, factors[..., :1], out=both[..., :width])
    torch.mul(x, factors[..., 1:], out=both[..., width:])
    return both


def _twice_backward(grad: Tensor, x: Tensor, factors: Tensor, d_x: Tensor, d_factors: Tensor) -> None:
    """Adds to `d_x` and fills `d_factors`; overwrites `grad`."""
    for place, part in enumerate(grad.chunk(2, -1)):
        d_x.addcmul_(part, factors[..., place : place + 1])
        torch.sum(part.mul_(x), -1, out=d_factors[..., place])
