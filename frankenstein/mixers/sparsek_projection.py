"""The SparseK projection: Lou et al. 2024, "Sparser is Faster and Less is More", https://arxiv.org/abs/2406.16747.

    p = argmin |p - z|^2  with  0 <= p <= 1, sum p = k    =>    p = clip(z - tau, 0, 1), sum p = k

a soft top-k: k = 1 is sparsemax, k >= n gives ones. `sparsek` projects whole rows, `prefix_thresholds` gives the tau of
every prefix of a row, which a causal model needs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def sparsek(z: Tensor, k: float | Tensor) -> Tensor:
    """The projection of the module docstring, exact, in O(n log n).

    Source: Lou et al. 2024, https://arxiv.org/abs/2406.16747. With I = {0 < p < 1}, the gradient g of p
    becomes g - mean_I(g) on I and 0 elsewhere.
    Args:
        z: (..., n) scores; -inf leaves an entry out: its p is 0.
        k: the sum of p, a number or a tensor that broadcasts to (...); where it reaches the entries left, all get 1.
    Returns:  p (..., n).
    """
    total = torch.as_tensor(k, dtype=z.dtype, device=z.device).expand(z.shape[:-1])
    return _SparseK.apply(z, total)


class _SparseK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, k: Tensor) -> Tensor:
        out = z.isneginf()
        least = z.masked_fill(out, torch.inf).amin(-1, keepdim=True)
        least = least.masked_fill(least.isposinf(), 0.0)
        z = torch.where(out, least - 4, z)  # p > 0 needs z > (least - 1) where k is at most the entries left
        tau = _threshold(z, k[..., None])
        everything = k[..., None] >= (~out).sum(-1, keepdim=True)
        p = (z - torch.where(everything, least - 2, tau)).clamp_(0, 1)
        ctx.save_for_backward((p > 0) & (p < 1))
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        grad = grad.masked_fill(~inside, 0.0)
        mean = grad.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp_(min=1)
        return torch.where(inside, grad - mean, 0.0), None


def _threshold(z: Tensor, k: Tensor) -> Tensor:
    """(..., 1): tau with sum clip(z - tau, 0, 1) = k < n. That sum is linear between the values z_i and z_i - 1."""
    ends, order = torch.cat([z, z - 1], -1).sort(-1, descending=True)
    # Below z_i the sum grows by one more entry, below z_i - 1 by one less.
    slope = torch.where(order < z.shape[-1], 1, -1).cumsum(-1)[..., :-1]
    mass = (slope * (ends[..., :-1] - ends[..., 1:])).cumsum(-1)
    last = torch.searchsorted(mass, k.contiguous()).clamp_(max=mass.shape[-1] - 1)
    tau = ends.gather(-1, last + 1) + (mass.gather(-1, last) - k) / slope.gather(-1, last).clamp(min=1)
    # The sums above carry rounding errors; the set they find gives tau to the last digit.
    gap = z - tau
    inside = (gap > 0) & (gap < 1)
    excess = gap.masked_fill(~inside, 0.0).sum(-1, keepdim=True) + (gap >= 1).sum(-1, keepdim=True) - k
    size = inside.sum(-1, keepdim=True)
    tau = torch.where(size > 0, tau + excess / size.clamp(min=1), tau)
    ones = z >= tau + 1 - _rounding(tau)
    flat = ones.sum(-1, keepdim=True) == k
    least_one = z.masked_fill(~ones, torch.inf).amin(-1, keepdim=True)
    rest = z.masked_fill(ones, -torch.inf).amax(-1, keepdim=True)
    return torch.where(flat & (rest < least_one - 1), (least_one - 1 + rest) / 2, tau)


def _rounding(tau: Tensor) -> Tensor:
    """Bound of the error of tau. A p that close to 1 is 1: else rounding would decide whether it has a gradient."""
    return 8 * torch.finfo(tau.dtype).eps * (1 + tau.abs())


def prefix_thresholds(u: Tensor, k: Tensor, chunk_size: int = 128) -> Tensor:
    """tau of `sparsek` for every prefix: sum_(j <= i) clip(u_j - tau_i, 0, 1) = k_i.

    Exact. The prefix before a chunk is sorted once for the whole chunk: O(N T (C + (T / C) log T)) operations on
    scalars, where everything else in the mixer is linear in T.
    Args:
        u: (N, T) scores.
        k: (T,), sum of p in the prefix 0 .. i; where k_i > i all of its p are 1.
        chunk_size: C, prefixes that are solved together.
    Returns:  tau (N, T).
    """
    return _PrefixThresholds.apply(u, k, chunk_size)


class _PrefixThresholds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, chunk_size: int) -> Tensor:
        exact = u.double()
        everything = k > torch.arange(u.shape[1], device=u.device)
        chunks = [
            _chunk_thresholds(exact[:, :a], exact[:, a : a + chunk_size], k[a : a + chunk_size].double())
            for a in range(0, u.shape[1], chunk_size)
        ]
        tau = torch.cat([t for t, _ in chunks], 1)
        tau = torch.where(everything, exact.cummin(1).values - 2, tau)
        size = torch.cat([s for _, s in chunks], 1).masked_fill(everything, 0.0)
        ctx.save_for_backward(exact, tau, size)
        ctx.chunk_size = chunk_size
        return tau.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        u, tau, size = ctx.saved_tensors
        share = torch.where(size > 0, grad / size.clamp(min=1), 0.0)  # of each u inside (tau, tau + 1)
        d_u = torch.zeros_like(u)
        for a in range(0, u.shape[1], ctx.chunk_size):
            t, w = tau[:, a : a + ctx.chunk_size], share[:, a : a + ctx.chunk_size]
            gap = u[:, None, a : a + t.shape[1]] - t[:, :, None]
            inside = ((gap > 0) & (gap < 1)).tril()
            d_u[:, a : a + t.shape[1]] += torch.where(inside, w[:, :, None], 0.0).sum(1)
            if a:
                t, order = t.sort(1)
                sums = F.pad(w.gather(1, order).cumsum(1), (1, 0))
                past = u[:, :a].contiguous()
                above, beyond = torch.searchsorted(t, past), torch.searchsorted(t + 1, past, right=True)
                d_u[:, :a] += sums.gather(1, above) - sums.gather(1, beyond)
        return d_u.to(grad.dtype), None, None


def _chunk_thresholds(past: Tensor, chunk: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """tau (N, C) of the prefixes that end in the chunk (N, C) after the past (N, a), and the size of I of each.

    The sum falls from n to 0 between the smallest u - 1 and the largest u: bisection over these ends finds the linear
    piece that crosses k, whose set I gives tau.
    """
    length = chunk.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=chunk.device).triu(1)
    own = chunk[:, None, :].masked_fill(future, -torch.inf)  # (N, C, C): what each prefix has of the chunk
    ordered = past.sort(1).values
    above = F.pad(ordered.flip(1).cumsum(1).flip(1), (0, 1))  # (N, a + 1): sums of all from each place on
    both = torch.cat([past, chunk], 1)
    ends = torch.cat([both, both - 1], 1).sort(1, descending=True).values
    low, high = torch.zeros_like(chunk, dtype=torch.int64), torch.full_like(chunk, ends.shape[1] - 1, dtype=torch.int64)
    for _ in range(ends.shape[1].bit_length()):
        middle = (low + high) // 2
        enough = _clipped_sum(ordered, above, own, ends.gather(1, middle)) >= k
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    tau = (ends.gather(1, low) + ends.gather(1, high)) / 2
    size = _inside(ordered, own, tau)
    tau = tau + (_clipped_sum(ordered, above, own, tau) - k) / size.clamp(min=1)
    tau = _centre(ordered, own, k, tau)
    return tau, _inside(ordered, own, tau)


def _clipped_sum(ordered: Tensor, above: Tensor, own: Tensor, tau: Tensor) -> Tensor:
    """(N, C): sum of clip(u - tau, 0, 1) over every prefix."""
    start, stop = torch.searchsorted(ordered, tau, right=True), torch.searchsorted(ordered, tau + 1)
    past = above.gather(1, start) - above.gather(1, stop) - (stop - start) * tau + (ordered.shape[1] - stop)
    return past + (own - tau[:, :, None]).clamp_(0, 1).sum(2)


def _inside(ordered: Tensor, own: Tensor, tau: Tensor) -> Tensor:
    """(N, C): how many u of every prefix lie between tau and tau + 1."""
    gap = own - tau[:, :, None]
    start, stop = torch.searchsorted(ordered, tau, right=True), torch.searchsorted(ordered, tau + 1)
    return ((gap > 0) & (gap < 1)).sum(2) + stop - start


def _centre(ordered: Tensor, own: Tensor, k: Tensor, tau: Tensor) -> Tensor:
    """tau, or the middle of the interval of all solutions where k entries exceed the others by more than 1."""
    edge = tau + 1 - _rounding(tau)
    ones = own >= edge[:, :, None]
    place = torch.searchsorted(ordered, edge)
    least_one = torch.where(ones, own, torch.inf).amin(2)
    least_one = torch.minimum(least_one, F.pad(ordered, (0, 1), value=torch.inf).gather(1, place))
    rest = own.masked_fill(ones, -torch.inf).amax(2)
    rest = torch.maximum(rest, F.pad(ordered, (1, 0), value=-torch.inf).gather(1, place))
    flat = (ones.sum(2) + ordered.shape[1] - place == k) & (rest < least_one - 1)
    return torch.where(flat, (least_one - 1 + rest) / 2, tau)
