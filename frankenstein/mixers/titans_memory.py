"""Linear memory learned at test time: Behrouz et al. 2025, "Titans", https://arxiv.org/abs/2501.00663.

    grad_t = 2 k_t (k_t^T M_c - v_t^T)        of the loss |M_c^T k_t - v_t|^2, at M_c, the memory before t's chunk
    S_t = eta_t S_{t-1} - theta_t grad_t      momentum (their eq. 14)
    M_t = (1 - alpha_t) M_{t-1} + S_t         forgetting (eq. 13)
    o_t = M_t^T q_t                           read after write (eq. 15)

The fast form is dense inside blocks of tokens and is derived in titans_blocks.py and titans_gates.py.
Shapes: q, k (B, T, H, K); v (B, T, H, V); theta, alpha, eta (B, T, H) in (0, 1); states M, S (B, H, K, V).
"""

import torch
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import chunk_on
from frankenstein.mixers.delta_chunks import full_precision
from frankenstein.mixers.titans_blocks import plan_blocks, scan_blocks


def titans_memory_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    *,
    chunk_size: int = 1,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence, one token at a time. Arguments as `titans_memory`."""
    memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    momentum = torch.zeros_like(memory)
    theta, alpha, eta = (gate[..., None, None] for gate in (theta, alpha, eta))
    outputs = []
    for t in range(q.shape[1]):
        if t % chunk_size == 0:
            start = memory
        error = torch.einsum("bhk,bhkv->bhv", k[:, t], start) - v[:, t]
        momentum = eta[:, t] * momentum - theta[:, t] * 2 * k[:, t, :, :, None] * error[:, :, None, :]
        memory = (1 - alpha[:, t]) * memory + momentum
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
    return torch.stack(outputs, 1), memory, momentum


def titans_memory(  # noqa: PLR0913  the operator's six tensors, and its contract
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    *,
    chunk_size: int = 1,
    initial_state: Tensor | None = None,
    block_size: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Titans' linear memory over a sequence, dense inside blocks and recurrent between them: linear in T.

    Source: Behrouz et al. 2025, eq. 13-15 and section 3.2, https://arxiv.org/abs/2501.00663; the triangular system is
    the one of Yang et al. 2024 for the delta rule, https://arxiv.org/abs/2406.06484, with momentum.
    Args:
        q, k: (B, T, H, K); no scale is applied.
        v: (B, T, H, V).
        theta, alpha, eta: (B, T, H) in (0, 1): learning rate, forgetting, momentum.
        chunk_size: tokens whose gradients are taken at the memory before the first of them; 1 is the sequential rule.
        initial_state: (B, H, K, V), the memory before the first token; None means zeros. Momentum starts at 0.
        block_size: tokens computed densely at once, about; does not change the result. Longer chunks are one block.
    Returns:  output (B, T, H, V), final memory (B, H, K, V), final momentum (B, H, K, V).
    Raises:
        FrankensteinError: if chunk_size or block_size is below 1.
    """
    _check_sizes("titans_memory", chunk_size, block_size)
    block_size = chunk_on(q, block_size, 64)
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    state = torch.cat([initial_state, torch.zeros_like(initial_state)], 2).flatten(0, 1)
    plan = plan_blocks(q.shape[1], chunk_size, block_size, both_ways=False)
    with full_precision(q):  # the error feeds back: what rounding loses would pile up
        o, last = scan_blocks(q, k, v, _learning_gates(theta, alpha, eta), state, plan)
    memory, momentum = last.unflatten(0, theta.shape[::2]).chunk(2, 2)
    return o, memory, momentum


def bidirectional_titans_memory_recurrent(  # noqa: PLR0913  as the fast form
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    *,
    theta_rev: Tensor | None = None,
    alpha_rev: Tensor | None = None,
    eta_rev: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 1,
) -> Tensor:
    """y = f(x) + flip(f(flip x)) - f1(x), row by row, from the recurrence. Arguments as the fast form."""
    reverse = [
        theta if theta_rev is None else theta_rev,
        alpha if alpha_rev is None else alpha_rev,
        eta if eta_rev is None else eta_rev,
    ]
    rows = []
    for row in range(q.shape[0]):
        n = q.shape[1] if mask is None else int(mask[row].sum())
        forward = [x[row : row + 1, :n] for x in (q, k, v, theta, alpha, eta)]
        backward = [x[row : row + 1, :n].flip(1) for x in (q, k, v, *reverse)]
        o = titans_memory_recurrent(*forward, chunk_size=chunk_size)[0]
        o = o + titans_memory_recurrent(*backward, chunk_size=chunk_size)[0].flip(1)
        alone = 2 * theta[row, :n, :, None] * (q[row, :n] * k[row, :n]).sum(-1, keepdim=True) * v[row, :n]
        rows.append(torch.cat([o[0] - alone, v.new_zeros(v.shape[1] - n, *v.shape[2:])]))
    return torch.stack(rows)


def bidirectional_titans_memory(  # noqa: PLR0913  the operator's tensors for both directions, and its contract
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    *,
    theta_rev: Tensor | None = None,
    alpha_rev: Tensor | None = None,
    eta_rev: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 1,
    block_size: int = 32,
) -> Tensor:
    """Titans' memory in both directions: y = f(x) + flip(f(flip x)) - f1(x), with f1 = 2 theta (q . k) v.

    The rule is a definition, not a published operator: the write depends on the memory, so that f1 is what a token
    alone would give and not exactly what both directions count.
    Args:
        theta_rev, alpha_rev, eta_rev: (B, T, H), in the order of time, for the reverse direction; None: those above.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `titans_memory`.
    Returns:  (B, T, H, V).
    Raises:
        FrankensteinError: if chunk_size or block_size is below 1.
    """
    _check_sizes("bidirectional_titans_memory", chunk_size, block_size)
    block_size = chunk_on(q, block_size, 64)
    padded = None if mask is None else ~mask[:, :, None, None]
    reverse = [theta_rev, alpha_rev, eta_rev]
    if padded is not None:  # read backwards, padding comes first: with theta = 0 it writes nothing
        k, v, theta = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0), theta.masked_fill(padded[..., 0], 0.0)
        reverse[0] = None if theta_rev is None else theta_rev.masked_fill(padded[..., 0], 0.0)
    gates = _learning_gates(theta, alpha, eta)
    own_gates = any(gate is not None for gate in reverse)
    others = [own if other is None else other for own, other in zip((theta, alpha, eta), reverse, strict=True)]
    gates_rev = _learning_gates(*others) if own_gates else gates
    with full_precision(q):  # the error feeds back: what rounding loses would pile up
        if chunk_size == 1:
            both = torch.cat([gates, gates_rev]) if own_gates else gates
            o, _ = scan_blocks(q, k, v, both, None, plan_blocks(q.shape[1], 1, block_size, both_ways=True))
        else:  # chunks start at the first token of a direction
            order = _reversed_order(mask)
            both = torch.cat([gates, _reverse(gates_rev.movedim(0, -1), order).movedim(-1, 0)], 1)
            queries, keys, values = (torch.cat([x, _reverse(x, order)]) for x in (q, k, v))
            plan = plan_blocks(q.shape[1], chunk_size, block_size, both_ways=False)
            forward, backward = scan_blocks(queries, keys, values, both, None, plan)[0].chunk(2)
            alone = gates[0][..., None] * (q * k).sum(-1, keepdim=True)
            o = torch.addcmul(forward + _reverse(backward, order), alone, v, value=-1)
    return o if padded is None else o.masked_fill(padded, 0.0)


def _check_sizes(operator: str, chunk_size: int, block_size: int) -> None:
    for name, size in (("chunk_size", chunk_size), ("block_size", block_size)):
        if size < 1:
            raise FrankensteinError(f"{operator}: found {name}={size}; expected at least 1")


def _learning_gates(theta: Tensor, alpha: Tensor, eta: Tensor) -> Tensor:
    """(3, B, T, H): w = 2 theta, what is kept, and momentum."""
    return torch.stack([2 * theta, 1 - alpha, eta])


def _reversed_order(mask: Tensor | None) -> Tensor | None:
    """(B, T): for every row its real tokens from last to first, then the padding; None where nothing is padded."""
    if mask is None:
        return None
    steps = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - steps, steps)


def _reverse(x: Tensor, order: Tensor | None) -> Tensor:
    """(B, T, ...) with the real tokens of every row reversed: the chunks of a direction start at its first token."""
    if order is None:
        return x.flip(1)
    return x.gather(1, order.reshape(*order.shape, *(1 for _ in x.shape[2:])).expand_as(x))
