"""Stability: clipping, and the tests for NaN, Inf and exploding gradients.

Source: Transformer Encoder Frankenstein, section 3.6 and algorithm 1.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError
from frankenstein.training.parallel import whole


class TrainingStopped(FrankensteinError):
    """Training was unstable more often than it may be."""


class Norms(NamedTuple):
    """Global gradient norms before and after clipping, 0-dim tensors."""

    before: Tensor
    after: Tensor


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Norms:
    """Scale the gradients in place by min(1, max_norm / (norm + 1e-6)); 0 only measures."""
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm == 0:
        return Norms(norm, norm)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return Norms(norm, norm * (max_norm / (norm + 1e-6)).clamp(max=1.0))


def unstable(loss: Tensor, norms: Norms, threshold: float) -> Tensor:
    """0-dim bool: loss or norm is not finite, or the norm after clipping is above the threshold (0: no threshold)."""
    bad = ~(torch.isfinite(loss) & torch.isfinite(norms.before))
    return bad | (norms.after > threshold) if threshold > 0 else bad


def not_finite(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> list[str]:
    """Names of the weights that hold NaN or Inf, or whose optimizer state does; waits for the device once."""
    named = [(name, tensor) for name, tensor in _tensors(parameters, optimizer) if tensor.is_floating_point()]
    if not named:
        return []
    device = named[0][1].device
    finite = torch.stack([torch.isfinite(tensor).all().to(device) for _, tensor in named]).tolist()
    return list(dict.fromkeys(name for (name, _), good in zip(named, finite, strict=True) if not good))


def _tensors(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters:
        yield name, parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            parts = value if isinstance(value, (tuple, list)) else (value,)
            yield from ((f"{name} ({key})", part) for part in parts if isinstance(part, Tensor))
