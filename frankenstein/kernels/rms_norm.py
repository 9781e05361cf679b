"""Root-mean-square norm: on a CPU in C (`rows.c`) or in as few torch operations as they allow; elsewhere torch's own.

    y = x / sqrt(mean(x^2) + eps) * weight

Source: Zhang and Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.kernels import rows


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x.

    Source: Zhang and Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467.
    Args:
        x: (..., D).
        weight: (D,); None is ones.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):  # torch has no fused kernel here
        scale = x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype)
        y: Tensor = _RmsNorm.apply(x, scale, eps)
        return y
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a scale per channel. Source: https://arxiv.org/abs/1910.07467."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return rms_norm(x, self.weight, self.eps)  # type: ignore[arg-type]


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps):  dx = r w dy - x r^3 mean(x w dy),  dw = sum over rows of r x dy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        if rows.usable(x, weight):
            y, inverse = rows.norm(x, weight, eps)
        else:
            inverse = _inverse_rms(x, eps)
            y = (x * inverse).mul_(weight)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        return *norm_gradients(grad, x, weight, inverse, ctx.eps, ctx.needs_input_grad[1]), None


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, eps: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where wanted, of the weight, differentiable once more.

    Args:
        grad, x: (..., D), of any floating types; weight: (D,); inverse: (..., 1), 1 / sqrt(mean(x^2) + eps).
    Returns:  that of x, in its type, and that of the weight.
    """
    if torch.is_grad_enabled():  # a second derivative needs the way from x to the inverse
        inverse = _inverse_rms(x, eps)
    elif rows.usable(x, grad, half=True) and rows.usable(weight):
        return rows.norm_gradients(grad, x, weight, inverse)
    grad = grad.to(torch.promote_types(x.dtype, torch.float32))
    product = grad * x
    with torch.autocast(x.device.type, enabled=False):
        along = (product @ weight)[..., None]
        weight_grad = inverse.reshape(-1) @ product.reshape(-1, x.shape[-1]) if wants_weight else None
    shrink = inverse.pow(3).mul_(along).mul_(-1.0 / x.shape[-1])
    return torch.addcmul((grad * inverse).mul_(weight), x, shrink).to(x.dtype), weight_grad


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., D) to (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
