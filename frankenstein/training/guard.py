"""Stability: clipping, the test for NaN, Inf and exploding gradients, and the report of a run that had to stop.

Source: Transformer Encoder Frankenstein, section 3.6 and algorithm 1; TORMENTED-BERT-Frankenstein, section 8.4.3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError

_LARGE = 1000.0
_LISTED = 5


class TrainingStopped(FrankensteinError):
    """Training was unstable more often than it may be."""


class Norms(NamedTuple):
    """Global gradient norms before and after clipping, 0-dim tensors."""

    before: Tensor
    after: Tensor


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Norms:
    """Scale the gradients in place by min(1, max_norm / (norm + 1e-6)); 0 only measures."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm == 0:
        return Norms(norm, norm)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return Norms(norm, norm * (max_norm / (norm + 1e-6)).clamp(max=1.0))


def unstable(loss: Tensor, norms: Norms, threshold: float) -> Tensor:
    """0-dim bool: loss or norm is not finite, or the norm after clipping is above the threshold (0: no threshold)."""
    bad = ~(torch.isfinite(loss) & torch.isfinite(norms.before))
    return bad | (norms.after > threshold) if threshold > 0 else bad


def first_bad_parameters(model: nn.Module) -> list[str]:
    """Names of the first parameters with NaN or Inf in the gradient, else of those with large entries there."""
    with_gradient = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, g in with_gradient if not torch.isfinite(g).all()]
    return (bad or [name for name, g in with_gradient if g.abs().max() > _LARGE])[:_LISTED]


def failure_notes(model: nn.Module, optimizer: Optimizer, batch: Any, values: dict[str, float]) -> dict[str, Any]:
    """What a reader needs to find the cause, ready for JSON (numbers that are not finite as text).

    The bad step's values, learning rates by group, parameters with bad or large gradients or bad weights, and shape,
    type and range of the last batch's arrays.
    """
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {
        "values": {name: str(value) for name, value in values.items()},
        "learning_rates": {str(group.get("name", i)): group["lr"] for i, group in enumerate(optimizer.param_groups)},
        "gradients_not_finite": [name for name, g in gradients if not torch.isfinite(g).all()],
        "gradients_above_1000": [name for name, g in gradients if g.abs().max() > _LARGE],
        "weights_not_finite": [name for name, p in model.named_parameters() if not torch.isfinite(p).all()],
        "batch": [_describe(part) for part in _arrays(batch)],
    }


def _arrays(batch: Any) -> list[Tensor]:
    """The tensors and arrays inside a batch of any nesting."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [found for part in batch for found in _arrays(part)]
    return [torch.as_tensor(batch)] if hasattr(batch, "__array__") else []


def _describe(array: Tensor) -> str:
    span = f", {array.min().item()} to {array.max().item()}" if array.numel() else ""
    return f"{tuple(array.shape)} {array.dtype}{span}"
