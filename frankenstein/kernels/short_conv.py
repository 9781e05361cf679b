"""Depthwise convolution over time on a CPU, in C (`short_conv.c`, where the equations stand)."""

from typing import Any

import torch
from torch import Tensor

from frankenstein.kernels.halves import half_bits, place, usable_in
from frankenstein.kernels.native import constant, loaded, pointer, sizes
from frankenstein.runtime import product_dtype

NAME = "short_conv"


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these."""
    return usable_in(NAME, x, half=True) and usable_in(NAME, weight) and product_dtype(x) != torch.float16


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
    """y_t = bias + sum_j weight_j x_(t + first + j), in the type of products, with float32 inside.

    Args:
        x: (B, T, D), float32 or bfloat16.
        weight: (D, C), float32.
        bias: (D,) or None.
        first: what the first tap reads, relative to the token.
    Returns:  (B, T, D).
    """
    y: Tensor = _Convolution.apply(x, weight, bias, first)
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
        x, filters = x.contiguous(), weight.mT.contiguous()
        y, room = torch.empty_like(x, dtype=product_dtype(x)), _room(x)
        places = (place(x), pointer(filters), pointer(bias), place(y), pointer(room))
        loaded(NAME).conv_forward(*places, *sizes(*x.shape, len(filters), first, half_bits(x, None, y)))
        ctx.save_for_backward(x, filters)
        ctx.first, ctx.biased = first, bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        dw, db = filters.new_empty(len(x), *filters.shape), filters.new_empty(len(x), x.shape[-1])
        room = _room(x, grad)
        places = (place(x), pointer(filters), place(grad), place(dx), pointer(dw), pointer(db), pointer(room))
        half = half_bits(x, grad, dx)
        loaded(NAME).conv_backward(*places, *sizes(*x.shape, len(filters), ctx.first, half))
        return dx, dw.sum(0).mT, db.sum(0) if ctx.biased else None, None


def _room(*read: Tensor) -> Tensor | None:
    """Where the threads widen what they read, if that is bfloat16."""
    if all(x.dtype == torch.float32 for x in read):
        return None
    threads = torch.get_num_threads()
    return torch.empty(threads, 2, read[0].shape[1], constant("block", NAME))
