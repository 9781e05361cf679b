"""Titans' linear memory over blocks of C tokens: what `titans_memory` is made of.

With M_c the memory before a token's chunk, w_t = 2 theta_t, e_t = v_t - M_c^T k_t and (M_0, S_0) from before the block,

    M_i = p_i M_0 + r_i S_0 + sum_{j<=i} G_ij k_j (w_j e_j)^T
    p_i = prod_{l<=i} (1 - alpha_l),   r_i = eta_1 G_i1
    G_ij = sum_{m=j..i} prod_{m<l<=i} (1 - alpha_l) prod_{j<l<=m} eta_l

G is a product of two triangular matrices, and nothing is ever divided by a product. A chunk shorter than the block
reads a memory M_i of the same block, i being the last token before the chunk. With N_jm = G_im (k_j . k_m) and e_0 what
v lacks after M_0 and S_0 alone, (1 + N diag(w)) e = e_0 is a unit triangular system, as Yang et al. 2024 solve it for
the delta rule, https://arxiv.org/abs/2406.06484. So chunks of one token, the sequential rule, cost about as much as
others. Source of the rule: Behrouz et al. 2025, https://arxiv.org/abs/2501.00663.
Shapes: n blocks, N = B H rows: q, k (n, N, C, K); v (n, N, C, V); a state is M above S, (N, 2 K, V).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.mixers.delta_chunks import in_full_precision


def to_blocks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, K) to blocks (n, B H, C, K), zeros after the last token."""
    short = -x.shape[1] % size
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


class BlockFactors(NamedTuple):
    """With what weights everything in a block enters what; all (n, B H, ...).

    read, compare: (C, 2), of M_0 and S_0 in what query i reads, and in what the memory holds for key j; writes: (C, C),
    G; end: (C, 2), of write j in the last M and S; kept: (3, 1, 1), of M_0 in the last M, S_0 in it, S_0 in the last S.
    """

    read: Tensor
    compare: Tensor
    writes: Tensor
    end: Tensor
    kept: Tensor


def block_factors(keep: Tensor, eta: Tensor, chunk_size: int, last: int) -> BlockFactors:
    """From keep = 1 - alpha and eta (n, B H, C, 1); `last` is the last real token's place in the last block."""
    read, writes, end, kept = _Products.apply(keep, eta, last)
    in_first = torch.arange(keep.shape[2], device=keep.device) < chunk_size
    start = torch.stack([in_first, torch.zeros_like(in_first)], -1).to(read.dtype)
    return BlockFactors(read, _before_chunk(read, chunk_size) + start, writes, end, kept)


def _before_chunk(x: Tensor, chunk_size: int) -> Tensor:
    """(..., C, N): row j becomes the row before j's chunk, 0 in the first chunk."""
    ends = x[..., chunk_size - 1 : -1 : chunk_size, :]
    before = ends if chunk_size == 1 else ends.repeat_interleave(chunk_size, -2)
    return F.pad(before, (0, 0, chunk_size, 0))


def _add_before_chunk(total: Tensor, grad: Tensor, chunk_size: int) -> None:
    """Adds to `total` the gradient of x in `_before_chunk(x, chunk_size)`."""
    ends = total[..., chunk_size - 1 : -1 : chunk_size, :]
    grad = grad[..., chunk_size:, :]
    ends += grad if chunk_size == 1 else grad.unflatten(-2, (-1, chunk_size)).sum(-2)


class _Products(torch.autograd.Function):
    """keep, eta (n, N, C, 1) and the last token's place to read, writes, end and kept of `BlockFactors`."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, eta: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        along_memory, along_momentum = _products(keep), _products(eta)
        writes = along_memory @ along_momentum
        read = torch.cat([along_memory[..., :1] * keep[:, :, :1], writes[..., :1] * eta[:, :, :1]], -1)
        rows = _last_rows(keep, last)
        end = torch.stack([writes[rows], along_momentum[rows]], -1)
        kept = torch.cat([read[rows], end[:, :, 0, 1:] * eta[:, :, 0]], -1)
        ctx.last = last
        ctx.save_for_backward(keep, eta, along_memory, along_momentum, writes)
        return read, writes, end, kept[..., None, None]

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        keep, eta, along_memory, along_momentum, writes = ctx.saved_tensors
        d_read, d_writes, d_end, d_kept = (grad.clone() for grad in grads)
        rows = _last_rows(keep, ctx.last)
        d_kept = d_kept[..., 0, 0]
        d_read[rows] += d_kept[..., :2]
        d_writes[rows] += d_end[..., 0]
        d_writes[..., 0] += d_read[..., 1] * eta[:, :, 0]
        d_memory = d_writes @ along_momentum.mT
        d_memory[..., 0] += d_read[..., 0] * keep[:, :, 0]
        d_momentum = along_memory.mT @ d_writes
        d_end[:, :, 0, 1] += d_kept[..., 2] * eta[:, :, 0, 0]
        d_momentum[rows] += d_end[..., 1]
        d_keep, d_eta = _products_backward(along_memory, d_memory), _products_backward(along_momentum, d_momentum)
        d_keep[:, :, 0, 0] = (d_read[..., 0] * along_memory[..., 0]).sum(-1)
        d_eta[:, :, 0, 0] = (d_read[..., 1] * writes[..., 0]).sum(-1) + d_kept[..., 2] * along_momentum[rows][..., 0]
        return d_keep, d_eta, None


def _last_rows(x: Tensor, last: int) -> tuple[Tensor, slice, Tensor]:
    """The index of the last token of every block in (n, N, C, ...)."""
    ends = torch.full((x.shape[0],), x.shape[2] - 1, device=x.device)
    ends[-1] = last
    return torch.arange(x.shape[0], device=x.device), slice(None), ends


def _products(x: Tensor) -> Tensor:
    """(..., C, 1) to L (..., C, C): L_ij = prod_{j<l<=i} x_l for i >= j, else 0."""
    size = x.shape[-2]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(lower, x, x.new_ones(())).cumprod(-2).tril_()


def _products_backward(products: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x in L, right for x = 0 as well: x_l is in L_ij for j < l <= i, beside L_il L_(l-1)j."""
    sums = ((products.mT @ grad)[..., 1:, :] * products[..., :-1, :]).sum(-1, keepdim=True)
    return F.pad(sums, (0, 0, 1, 0))


def scan_blocks(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, memory: Tensor, factors: BlockFactors, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The memory over blocks.

    Args:
        q, k: (n, N, C, K).
        v: (n, N, C, V).
        w: (n, N, C, 1), 2 theta.
        memory: (N, K, V), before the first block; its momentum is 0.
        factors: of the blocks.
        chunk_size: tokens whose gradients are taken at the memory before the first of them; C is a multiple.
    Returns:  output (n, N, C, V), last memory and momentum (N, K, V).
    """
    o, memory, momentum = _BlockScan.apply(q, k, v, w, memory, chunk_size, *factors)
    return o, memory, momentum


class _BlockScan(torch.autograd.Function):
    """`scan_blocks`; the backward recomputes what is dense in a block, so that only states are kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor, memory: Tensor, chunk_size: int, *factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = memory.new_empty(len(q) + 1, len(memory), 2 * k.shape[-1], v.shape[-1])
        torch.cat([memory, torch.zeros_like(memory)], 1, out=states[0])
        errors, o = torch.empty_like(v), torch.empty_like(v)
        for block, state in enumerate(states[:-1]):
            query, key, rate = q[block], k[block], w[block]
            f = BlockFactors(*(x[block] for x in factors))
            error = torch.baddbmm(v[block], _twice(key, f.compare), state, alpha=-1)
            if chunk_size < q.shape[2]:
                system = _before_chunk(f.writes, chunk_size).mul_(key @ key.mT).mul_(rate.mT)
                error = _solve(system, error)
            write = rate * error
            torch.bmm(_twice(query, f.read), state, out=o[block])
            o[block].baddbmm_((query @ key.mT).mul_(f.writes), write)
            errors[block] = error
            torch.baddbmm(_keep(state, f.kept), _twice(key, f.end).mT, write, out=states[block + 1])
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(q, k, v, w, states, errors, *factors)
        memory, momentum = states[-1].chunk(2, 1)
        return o, memory.clone(), momentum.clone()

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, d_o: Tensor, d_memory: Tensor, d_momentum: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, w, states, errors, *factors = ctx.saved_tensors
        inputs = (q, k, v, w, *factors)
        grads = [torch.empty_like(x) for x in inputs]
        d_state = torch.cat([d_memory, d_momentum], 1)
        for block in reversed(range(len(q))):
            values, found = ([x[block] for x in tensors] for tensors in (inputs, grads))
            kept = (states[block], errors[block])
            d_state = _block_backward(values, kept, d_o[block], d_state, found, ctx.chunk_size)
        return *grads[:4], d_state[:, : k.shape[-1]], None, *grads[4:]


def _twice(x: Tensor, factors: Tensor) -> Tensor:
    """(N, C, 2 K): x (N, C, K) times each of its two factors (N, C, 2)."""
    return (x[:, :, None] * factors[..., None]).flatten(2)


def _twice_backward(grad: Tensor, x: Tensor, factors: Tensor, d_factors: Tensor) -> Tensor:
    """The gradient of x; that of the factors is written to `d_factors`."""
    grad = grad.unflatten(2, (2, -1))
    torch.sum(grad * x[:, :, None], -1, out=d_factors)
    first, second = grad.unbind(2)
    return torch.addcmul(first * factors[..., :1], second, factors[..., 1:])


def _solve(system: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
    """x (N, C, V) times the inverse of 1 + system, which is strictly lower triangular, or of its transpose."""
    # From the right, on transposed views: that is the layout in memory that LAPACK wants, so that nothing is copied.
    a = system if transposed else system.mT
    return torch.linalg.solve_triangular(a, x.mT, upper=not transposed, left=False, unitriangular=True).mT


def _keep(state: Tensor, kept: Tensor) -> Tensor:
    """What a block leaves of M_0 and S_0."""
    memory, momentum = state.chunk(2, 1)
    return torch.cat([torch.addcmul(kept[:, 0] * memory, kept[:, 1], momentum), kept[:, 2] * momentum], 1)


def _keep_backward(grad: Tensor, state: Tensor, kept: Tensor, d_kept: Tensor) -> Tensor:
    """The gradient of the state; that of the factors is written to `d_kept`."""
    (memory, momentum), (d_memory, d_momentum) = state.chunk(2, 1), grad.chunk(2, 1)
    pairs = ((d_memory, memory), (d_memory, momentum), (d_momentum, momentum))
    for place, (x, y) in enumerate(pairs):
        d_kept[:, place] = x.flatten(1)[:, None] @ y.flatten(1)[:, :, None]
    return torch.cat([kept[:, 0] * d_memory, torch.addcmul(kept[:, 2] * d_momentum, kept[:, 1], d_memory)], 1)


def _block_backward(
    inputs: list[Tensor],
    kept: tuple[Tensor, Tensor],
    d_o: Tensor,
    d_state: Tensor,
    grads: list[Tensor],
    chunk_size: int,
) -> Tensor:
    """The gradient of the state before a block; those of its inputs, in the order of `_BlockScan`, go to `grads`."""
    (q, k, _, w, *factors), (state, error) = inputs, kept
    d_q, d_k, d_v, d_w, *d_factors = grads
    f, d_f = BlockFactors(*factors), BlockFactors(*d_factors)
    write, products = w * error, q @ k.mT
    d_write = (products * f.writes).mT @ d_o
    d_write.baddbmm_(_twice(k, f.end), d_state)
    torch.sum(d_write * error, -1, keepdim=True, out=d_w)
    d_inside = d_o @ write.mT
    torch.mul(products, d_inside, out=d_f.writes)
    d_inside.mul_(f.writes)
    torch.bmm(d_inside, k, out=d_q)
    torch.bmm(d_inside.mT, q, out=d_k)
    d_error = torch.mul(w, d_write, out=d_v)
    if chunk_size < q.shape[1]:
        before, products = _before_chunk(f.writes, chunk_size), k @ k.mT
        inside = before * products
        d_v.copy_(_solve(inside * w.mT, d_error, transposed=True))
        d_system = (d_v @ error.mT).neg_()
        d_w += inside.mul_(d_system).sum(-2)[..., None]
        d_system.mul_(w.mT)
        _add_before_chunk(d_f.writes, products.mul_(d_system), chunk_size)
        d_system.mul_(before)
        d_k.baddbmm_(d_system + d_system.mT, k)
    d_q += _twice_backward(d_o @ state.mT, q, f.read, d_f.read)
    d_k += _twice_backward(write @ d_state.mT, k, f.end, d_f.end)
    d_k -= _twice_backward(d_error @ state.mT, k, f.compare, d_f.compare)
    d_f.compare.neg_()
    d_before = _keep_backward(d_state, state, f.kept, d_f.kept)
    d_before.baddbmm_(_twice(q, f.read).mT, d_o)
    return d_before.baddbmm_(_twice(k, f.compare).mT, d_error, alpha=-1)
