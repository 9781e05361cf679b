"""Norms, and the elementwise layers that replace them; each is built as `NORMS[name](width)`."""

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
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


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
