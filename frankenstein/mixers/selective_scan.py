"""Selective scan: Gu and Dao 2023 (Mamba), eq. 2 and algorithm 2, https://arxiv.org/abs/2312.00752.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t^T,   y_t = h_t C_t + D * u_t         one direction
    y = f(u) + flip(f(flip u)) - f1(u),   f1(u)_t = (C_t . B_t) dt_t u_t + D * u_t     both directions

A is discretized by zero-order hold, B by Euler's rule, as in the authors' code, https://github.com/state-spaces/mamba.
Shapes: u, dt (B, T, D); A (D, N); B, C (B, T, N); D (D,); state h (B, D, N).

The plain form and the rule stand here; the fast form is the scan of `tiled_scan.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.mixers.tiled_scan import tiled_scan


def selective_scan_recurrent(  # noqa: PLR0913  the operator contract
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `selective_scan`."""
    dt = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[1]):
        written = (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        state = torch.exp(dt[:, t, :, None] * A) * state + written
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    y = torch.stack(outputs, 1)
    y = y if D is None else y + D * u
    y = y if z is None else y * F.silu(z)
    return y, state if return_last_state else None


def selective_scan(  # noqa: PLR0913  the operator contract
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Selective state space model over one direction: linear in T.

    Source: Gu and Dao 2023, algorithm 2, https://arxiv.org/abs/2312.00752. Half precision is computed in float32.
    Args:
        u: (B, T, D), input.
        delta: (B, T, D), step size, or what `delta_bias` and softplus make it of.
        A: (D, N), rates of decay, < 0.
        B, C: (B, T, N), what a token writes into the state and reads from it.
        D: (D,), weight of the input in the output.
        z: (B, T, D); its SiLU gates the output.
        delta_bias: (D,), added to delta.
        delta_softplus: the step size is the softplus of the sum.
        return_last_state: return the last state, else None in its place.
    Returns:  output (B, T, D), last state (B, D, N) or None.
    """
    dtype = _precision(u, delta, A, B, C)
    v, dt = u.to(dtype), _step_size(delta, delta_bias, delta_softplus, dtype)
    y, last = tiled_scan(v, dt, A.to(dtype), B.to(dtype), C.to(dtype))
    y = y if D is None else torch.addcmul(y, v, D.to(dtype))
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype), last.to(u.dtype) if return_last_state else None


def bidirectional_selective_scan_recurrent(  # noqa: PLR0913  the operator contract
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    delta_rev: Tensor | None = None,
    A_rev: Tensor | None = None,
    B_rev: Tensor | None = None,
    C_rev: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The rule of the module docstring, from the recurrence. Arguments as `bidirectional_selective_scan`."""
    u = u if mask is None else u * mask[:, :, None]
    options: dict[str, Any] = {"D": D, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
    forward, _ = selective_scan_recurrent(u, delta, A, B, C, **options)
    pairs = ((delta, delta_rev), (A, A_rev), (B, B_rev), (C, C_rev))
    delta_rev, A_rev, B_rev, C_rev = (own if rev is None else rev for own, rev in pairs)
    backward, _ = selective_scan_recurrent(u.flip(1), delta_rev.flip(1), A_rev, B_rev.flip(1), C_rev.flip(1), **options)
    u_one, delta_one, B_one, C_one = (x.flatten(0, 1)[:, None] for x in (u, delta, B, C))
    alone, _ = selective_scan_recurrent(u_one, delta_one, A, B_one, C_one, **options)
    y = forward + backward.flip(1) - alone.view_as(u)
    return y if mask is None else y * mask[:, :, None]


def bidirectional_selective_scan(  # noqa: PLR0913  the operator contract
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    delta_rev: Tensor | None = None,
    A_rev: Tensor | None = None,
    B_rev: Tensor | None = None,
    C_rev: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Selective scan in both directions, every token counted once: linear in T.

    Source: the sum of both directions with one diagonal is the quasiseparable matrix of Hwang et al. 2024 (Hydra),
    https://arxiv.org/abs/2407.09941, whose diagonal has parameters of its own.
    Args:
        delta_rev, A_rev, B_rev, C_rev: what the reverse direction uses instead, in the order of the tokens.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `selective_scan`.
    Returns:  (B, T, D).
    """
    dtype = _precision(u, delta, A, B, C)
    padded = None if mask is None else ~mask[:, :, None]
    v, A, B, C = (x.to(dtype) for x in (u, A, B, C))
    v = v if padded is None else v.masked_fill(padded, 0.0)
    dt = _step_size(delta, delta_bias, delta_softplus, dtype)
    dt_rev = dt if delta_rev is None else _step_size(delta_rev, delta_bias, delta_softplus, dtype)
    A_rev, B_rev, C_rev = (own if rev is None else rev.to(dtype) for own, rev in ((A, A_rev), (B, B_rev), (C, C_rev)))
    forward, _ = tiled_scan(v, dt, A, B, C)
    backward, _ = tiled_scan(v, dt_rev, A_rev, B_rev, C_rev, reverse=True)
    itself = -(B * C).sum(-1, keepdim=True) * dt
    itself = itself if D is None else itself + D.to(dtype)
    y = torch.addcmul(forward + backward, itself, v)
    y = y if padded is None else y.masked_fill(padded, 0.0)
    return y.to(u.dtype)


def _precision(*tensors: Tensor) -> torch.dtype:
    """The widest type of the tensors, float32 at least."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = delta.to(dtype)
    dt = dt if bias is None else dt + bias.to(dtype)
    return F.softplus(dt) if softplus else dt
