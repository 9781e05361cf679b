"""Norms, and the elementwise layers that replace them; each is built as `NORMS[name](width)`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.registry import Registry

NORMS: Registry[type[nn.Module]] = Registry("norm", "frankenstein.model")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x.

    Source: Zhang and Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467.
    Args:
        x: (..., D).
        weight: (D,).
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        y: Tensor = _RmsNorm.apply(x, weight.to(x.dtype), eps)  # torch has no fused kernel here
        return y
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps):  dx = r w dy - x r^3 mean(x w dy),  dw = sum over rows of r x dy.

    In as few passes over memory as torch's operators allow: half the time of the composed form, and x alone is kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative needs the way from x to it
            inverse = _inverse_rms(x, ctx.eps)
        product = grad * x
        with torch.autocast(x.device.type, enabled=False):
            along = (product @ weight)[..., None]
            weight_grad = inverse.reshape(-1) @ product.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        shrink = inverse.pow(3).mul_(along).mul_(-1.0 / x.shape[-1])
        return torch.addcmul((grad * inverse).mul_(weight), x, shrink), weight_grad, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., D) to (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Dynamic tanh: tanh(alpha x) * weight + bias, with no statistics of x.

    Source: Zhu et al. 2025, eq. 1, https://arxiv.org/abs/2503.10622.
    Args:
        x: (..., D).
        alpha: (1,).
        weight, bias: (D,).
    """
    return torch.addcmul(bias, (alpha * x).tanh(), weight)


def derf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Dynamic erf: erf(alpha x + shift) * weight + bias, with no statistics of x.

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers", https://arxiv.org/abs/2512.10938.
    Args:
        x: (..., D).
        alpha, shift: (1,).
        weight, bias: (D,).
    """
    return torch.addcmul(bias, torch.addcmul(shift, alpha, x).erf(), weight)


@NORMS.register("rms_norm")
class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale per channel. Source: https://arxiv.org/abs/1910.07467."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return rms_norm(x, self.weight, self.eps)


@NORMS.register("layer_norm")
class LayerNorm(nn.LayerNorm):
    """Layer norm with scale and bias per channel. Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450."""


@NORMS.register("dynamic_tanh")
class DynamicTanh(nn.Module):
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
class Derf(nn.Module):
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
