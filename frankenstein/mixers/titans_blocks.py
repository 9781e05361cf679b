"""Titans' linear memory over blocks of C tokens: what `titans_memory` is made of.

With e_t = v_t - M_c^T k_t, M_c the memory before t's chunk, and the coefficients m, p, r of titans_gates.py, m_c. being
the row before t's chunk,

    e_t = v_t - (p_c M_0 + r_c S_0)^T k_t - sum_j m_cj (k_t . k_j) e_j        a unit triangular system
    o_t = (p_t M_0 + r_t S_0)^T q_t + sum_j m_tj (q_t . k_j) e_j

as Yang et al. 2024 solve it for the delta rule, https://arxiv.org/abs/2406.06484. So chunks of one token, the
sequential rule, cost about as much as others. The reverse direction is the same on the same blocks, with coefficients
above the diagonal in place of below; both share the dot products. Only what needs the state is computed block by
block, in titans_scan.py. Source of the rule: Behrouz et al. 2025, https://arxiv.org/abs/2501.00663.
"""

from typing import Any

import torch
from torch import Tensor

from frankenstein.kernels import titans_memory_cpu
from frankenstein.kernels.native import available
from frankenstein.mixers.delta_chunks import in_full_precision
from frankenstein.mixers.titans_gates import Gates, Order
from frankenstein.mixers.titans_scan import Direction, Inputs, Kept, Plan

KERNEL_STATE = (
    64 * 64
)  # K V; the kernel's time over the blocks' on two cores: .1 to .3 at 16 x 16, .5 to .7 at 64 x 64, 1.3 at 128 x 128


def plan_blocks(length: int, chunk_size: int, block_size: int, *, both_ways: bool) -> Plan:
    """Blocks of `block_size` tokens, or up to half as many more where that adds fewer at the end; whole chunks."""
    chunk_size = min(chunk_size, length)
    least = chunk_size * max(1, block_size // chunk_size)
    sizes = range(least, least + block_size // 2 + 1, 4 if chunk_size == 1 else chunk_size)
    whole = -(-length // chunk_size) * chunk_size
    size = whole if whole <= sizes[-1] else min(sizes, key=lambda size: -length % size)
    return Plan(size, chunk_size, length, both_ways)


def scan_blocks(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The memory over blocks, dense inside of them and recurrent between them.

    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        gates: (3, B, T, H), w = 2 theta, 1 - alpha and eta; (6, B, T, H) where the reverse direction has its own.
        state: (B H, 2 K, V), M above S before the first token, in one direction; None means 0.
        plan: how the sequence is cut and read.
    Returns:  output (B, T, H, V), both ways f(x) + flip(f(flip x)) - w (q . k) v; last state, empty if `state` is None.
    """
    if _token_by_token(q, v, plan):
        o, last = titans_memory_cpu.memory(q, k, v, gates, state, both_ways=plan.both_ways)
        return o, q.new_empty(0) if state is None else last
    return _BlockScan.apply(q, k, v, gates, state, plan)


def _token_by_token(q: Tensor, v: Tensor, plan: Plan) -> bool:
    """Whether the C kernel is the faster form: the blocks' matrix products win at wider heads."""
    fits = q.is_cpu and q.dtype == torch.float32 and plan.chunk_size == 1 and q.shape[-1] * v.shape[-1] <= KERNEL_STATE
    return fits and available(titans_memory_cpu.NAME)


class _BlockScan(torch.autograd.Function):
    """`scan_blocks`; the backward recomputes what takes one pass, and keeps what takes a product."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        heads = q.shape[2]
        reads, values = _to_blocks([q, k], plan), _to_blocks([v], plan)
        keys = reads[:, plan.size :].contiguous()
        x = Inputs(reads, keys, values, reads @ keys.mT)
        gates = _gates_to_blocks(gates, plan)
        o = torch.zeros_like(values)
        kept: list[Tensor] = []
        for order, own in _directions(gates, plan):
            kept += Direction(x, own, order, plan, stateful=state is not None).forward(o, state)
        if plan.both_ways:
            o.addcmul_(_alone(x, gates[0]), values, value=-1)
        ctx.plan, ctx.heads, ctx.stateful = plan, heads, state is not None
        ctx.save_for_backward(*x, gates, *kept)
        return _from_blocks(o, heads, plan), o.new_empty(0) if state is None else kept[-1][-1].clone()

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, d_o: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: gradient checkpointing computes them when they are asked for
        *inputs, gates = saved[:5]
        x, kept, plan = Inputs(*inputs), saved[5:], ctx.plan
        d_o = _to_blocks([d_o], plan)
        d_x = Inputs(*(torch.zeros_like(t) for t in x))
        d_gates = torch.zeros_like(gates[..., 0])
        d_state = None
        for turn, (order, own) in enumerate(_directions(gates, plan)):
            direction = Direction(x, own, order, plan, stateful=ctx.stateful)
            d_own, d_state = direction.backward(
                Kept(*kept[5 * turn : 5 * turn + 5]), d_o, d_last if ctx.stateful else None, d_x
            )
            d_gates[3 * turn % len(gates) :][:3] += d_own
        if plan.both_ways:
            _alone_backward(x, gates[0], d_o, d_x, d_gates[0])
        d_q, d_k = d_x.reads.baddbmm_(d_x.dots, x.k).chunk(2, 1)
        d_k += d_x.k.baddbmm_(d_x.dots.mT, x.reads)
        d_qkv = (_from_blocks(t, ctx.heads, plan) for t in (d_q, d_k, d_x.v))
        return *d_qkv, _gates_from_blocks(d_gates, ctx.heads, plan), d_state, None


def _directions(gates: Tensor, plan: Plan) -> list[tuple[Order, Gates]]:
    """The directions that are read, with their gates."""
    orders = (Order(False), Order(True)) if plan.both_ways else (Order(False),)
    return [(order, Gates(*gates[3 * turn % len(gates) :][:3])) for turn, order in enumerate(orders)]


def _alone(x: Inputs, rate: Tensor) -> Tensor:
    """(N, C, 1): w (q . k)."""
    return (x.dots.diagonal(dim1=1, dim2=2) * rate[..., 0].mT)[..., None]


def _alone_backward(x: Inputs, rate: Tensor, d_o: Tensor, d_x: Inputs, d_rate: Tensor) -> None:
    """Adds the gradients of - w (q . k) v."""
    d_x.v.addcmul_(_alone(x, rate), d_o, value=-1)
    d_alone = (d_o * x.v).sum(-1)
    d_rate.sub_((d_alone * x.dots.diagonal(dim1=1, dim2=2)).mT)
    d_x.dots.diagonal(dim1=1, dim2=2).addcmul_(d_alone, rate[..., 0].mT, value=-1)


def _to_blocks(inputs: list[Tensor], plan: Plan) -> Tensor:
    """From (B, T, H, K) each to blocks (n B H, C, K) of them, one over the other, with zeros after the last token."""
    batch, length, heads, width = inputs[0].shape
    blocks = inputs[0].new_empty(plan.blocks, batch, heads, len(inputs) * plan.size, width)
    whole, rest = divmod(length, plan.size)
    for part, x in zip(blocks.chunk(len(inputs), 3), inputs, strict=True):
        part[:whole] = x[:, : length - rest].unflatten(1, (whole, plan.size)).permute(1, 0, 3, 2, 4)
        if rest:
            part[whole, :, :, :rest] = x[:, length - rest :].transpose(1, 2)
            part[whole, :, :, rest:] = 0
    return blocks.flatten(0, 2)


def _from_blocks(x: Tensor, heads: int, plan: Plan) -> Tensor:
    """(n B H, C, K) to (B, T, H, K)."""
    blocks = x.unflatten(0, (plan.blocks, -1, heads))
    return blocks.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : plan.length]


def _gates_to_blocks(gates: Tensor, plan: Plan) -> Tensor:
    """(G, B, T, H) to (G, C, n B H, 1), zeros after the last token."""
    count, batch, length, heads = gates.shape
    blocks = gates.new_zeros(count, batch, plan.blocks * plan.size, heads)
    blocks[:, :, :length] = gates
    return blocks.view(count, batch, plan.blocks, plan.size, heads).permute(0, 3, 2, 1, 4).flatten(2)[..., None]


def _gates_from_blocks(gates: Tensor, heads: int, plan: Plan) -> Tensor:
    """(G, C, n B H) to (G, B, T, H)."""
    blocks = gates.view(len(gates), plan.size, plan.blocks, -1, heads)
    return blocks.permute(0, 3, 2, 1, 4).flatten(2, 3)[:, :, : plan.length]
