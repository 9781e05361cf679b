"""Norms, and the elementwise layers that replace them; each is built as `NORMS[name](width)`."""

from typing import Any

import torch
from torch import Tensor, nn

from frankenstein.kernels import rows
from frankenstein.kernels.rms_norm import RMSNorm, rms_norm
from frankenstein.registry import Registry

__all__ = ["NORMS", "Derf", "DynamicTanh", "Elementwise", "LayerNorm", "RMSNorm", "derf", "dyt", "rms_norm"]

NORMS: Registry[type[nn.Module]] = Registry("norm", "frankenstein.model")


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Dynamic tanh: tanh(alpha x) * weight + bias, with no statistics of x.

    Source: Zhu et al. 2025, eq. 1, https://arxiv.org/abs/2503.10622.
    Args:
        x: (..., D).
        alpha: (1,).
        weight, bias: (D,).
    """
    if rows.usable(x, alpha, weight, bias):
        y: Tensor = _DynamicTanh.apply(x, alpha, weight, bias)
        return y
    return torch.addcmul(bias, (alpha * x).tanh(), weight)


class _DynamicTanh(torch.autograd.Function):
    """`dyt` by the C kernels; a second derivative goes through torch's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, weight)
        return rows.dynamic_tanh(x, alpha, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, alpha, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return rows.dynamic_tanh_gradients(grad, x, alpha, weight)
        t = (alpha * x).tanh()
        inner, others = grad * weight * (1 - t * t), tuple(range(x.ndim - 1))
        return inner * alpha, (inner * x).sum().reshape(1), (grad * t).sum(others), grad.sum(others)


def derf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Dynamic erf: erf(alpha x + shift) * weight + bias, with no statistics of x.

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers", https://arxiv.org/abs/2512.10938.
    Args:
        x: (..., D).
        alpha, shift: (1,).
        weight, bias: (D,).
    """
    return torch.addcmul(bias, torch.addcmul(shift, alpha, x).erf(), weight)


NORMS.register("rms_norm")(RMSNorm)


@NORMS.register("layer_norm")
class LayerNorm(nn.LayerNorm):
    """Layer norm with scale and bias per channel. Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450."""


class Elementwise(nn.Module):
    """A layer in place of a norm: a small stream stays small in it, so that the encoder scales its embeddings up."""


@NORMS.register("dynamic_tanh")
class DynamicTanh(Elementwise):
    """tanh with one learned slope, a scale and a bias per channel, in place of a norm.

    Source: Zhu et al. 2025, https://arxiv.org/abs/2503.10622. The slope is one number, as there; seed 002 eq. 47 gives
    it a value per channel.
    """

    def __init__(self, width: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return dyt(x, self.alpha, self.weight, self.bias)


@NORMS.register("derf")
class Derf(Elementwise):
    """erf with one learned slope and shift, a scale and a bias per channel, in place of a norm.

    Source: Chen et al. 2025, https://arxiv.org/abs/2512.10938.
    """

    def __init__(self, width: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.shift = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return derf(x, self.alpha, self.shift, self.weight, self.bias)
