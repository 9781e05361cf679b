"""HoPE: hyperbolic positions for queries and keys, as a relative and bounded form.

A pair of channels (a, b) in light-cone coordinates is u = (a + b) / sqrt 2, w = (a - b) / sqrt 2, where the Lorentz
boost [[cosh, sinh], [sinh, cosh]](m t) of position m is diag(e^(m t), e^(-m t)). Queries boosted by m, keys by -n and a
decay e^(-s |m - n|) give, summed over the pairs i,

    score(m, n) = q_u k_u e^(-(s - t)(m - n)) + q_w k_w e^(-(s + t)(m - n))        m >= n; u and w swapped for m < n

with t_i = base^(-2i/K) and s_i = t_i + damping, so that no exponent is ever positive: each term falls, or stays, with
the distance. At distance 0 it is the plain dot product.
Source: Dai et al. 2025, https://arxiv.org/abs/2509.05218 (Lorentz rotations, decay with distance), published without
code. Where we differ: the decay is symmetric, for encoders that see both ways, and its rate is tied to t. The boosts of
seed 002 section 3.3 are never defined, and boosting queries and keys alike makes scores grow with m + n.
Shapes: q, k (B, T, H, K); pairs are the channels (2i, 2i + 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.errors import FrankensteinError

_LEAF = 4  # tokens whose pairs are taken one by one


def hope_scores_dense(q: Tensor, k: Tensor, *, base: float = 10000.0, damping: float = 0.0) -> Tensor:
    """The equation above, pair by pair: O(T^2 K) memory. Arguments as `hope_scores`."""
    past, future = _rates(q, base, damping)
    return _pairs(_light_cone(q), _light_cone(k), past, future)


def hope_scores(q: Tensor, k: Tensor, *, base: float = 10000.0, damping: float = 0.0) -> Tensor:
    """Dot products of all queries and keys under HoPE, by matrix products.

    The keys and queries of two neighbouring halves meet at the border between them: m - n = (m - border) + (border - n)
    splits every decay into two factors <= 1. The halves are then halved in turn.
    Source: Dai et al. 2025, https://arxiv.org/abs/2509.05218; see the module for where we differ.
    Args:
        q, k: (B, T, H, K), K even.
        base: of the rates t_i, > 0.
        damping: further decay of every channel per token of distance, >= 0.
    Returns:  (B, H, T, T), not scaled; entry (m, n) is query m with key n.
    Raises:   FrankensteinError: if K is odd.
    """
    past, future = _rates(q, base, damping)
    return _within(_light_cone(q), _light_cone(k), past, future)


class Hope:
    """`hope_scores` with its settings, as a mixer's context carries it: (q, k) to (B, H, T, T)."""

    def __init__(self, base: float = 10000.0, damping: float = 0.0) -> None:
        self.base, self.damping = base, damping

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return hope_scores(q, k, base=self.base, damping=self.damping)


def _rates(q: Tensor, base: float, damping: float) -> tuple[Tensor, Tensor]:
    """Decay rates (K,) of the light-cone channels for earlier and for later keys."""
    width = q.shape[-1]
    if width % 2:
        raise FrankensteinError(f"HoPE takes pairs of channels; found {width} channels a head, expected an even number")
    exponents = torch.arange(0, width, 2, device=q.device, dtype=torch.float64) / width
    fast = 2 * base**-exponents + damping
    slow = torch.full_like(fast, damping)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.cat([slow, fast]).to(dtype), torch.cat([fast, slow]).to(dtype)


def _light_cone(x: Tensor) -> Tensor:
    """(B, T, H, K) to (B, H, T, K): all u, then all w."""
    a, b = (x.transpose(1, 2) * 0.5**0.5).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([a + b, a - b], -1)


def _within(q: Tensor, k: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """Scores (..., T, T) of one stretch of tokens (..., T, K)."""
    length = q.shape[-2]
    if length <= _LEAF:
        return _pairs(q, k, past, future)
    odd = (0, 0, 0, length % 2)
    q, k = (F.pad(x, odd).unflatten(-2, (2, -1)) for x in (q, k))
    inside = _within(q, k, past, future)
    steps = torch.arange(q.shape[-2], device=q.device, dtype=past.dtype)[:, None]
    after, before = steps, q.shape[-2] - steps  # distance from the border, in the second and in the first half
    q1, q2 = q.unbind(-3)
    k1, k2 = k.unbind(-3)
    lower = (q2 * (-past * after).exp()) @ (k1 * (-past * before).exp()).mT
    upper = (q1 * (-future * before).exp()) @ (k2 * (-future * after).exp()).mT
    first, second = inside.unbind(-3)
    whole = torch.cat([torch.cat([first, upper], -1), torch.cat([lower, second], -1)], -2)
    return whole[..., :length, :length]


def _pairs(q: Tensor, k: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """Scores (..., T, T) of tokens (..., T, K), each pair by itself."""
    steps = torch.arange(q.shape[-2], device=q.device, dtype=past.dtype)
    distance = (steps[:, None] - steps)[..., None]
    decay = torch.where(distance >= 0, -past * distance, future * distance).exp()
    return (q[..., :, None, :] * k[..., None, :, :] * decay).sum(-1)
