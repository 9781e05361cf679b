"""Norm and quantization of rows on a CPU, in C (`rows.c`). The callers have the same in torch operations."""

import ctypes

import torch
from torch import Tensor

from frankenstein.kernels.native import available, constant, loaded, pointer, sizes

NAME = "rows"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 on the CPU, not while torch.compile traces, which fuses on its own."""
    if torch.compiler.is_compiling():
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and available(NAME)


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm of x (..., D) by the weight (D,), and 1 / sqrt(mean(x^2) + eps), (..., 1)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    tensors = (x, weight, y, inverse)
    loaded(NAME).norm_forward(*map(pointer, tensors), ctypes.c_double(eps), *_sizes(x))
    return y, inverse


def norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of the weight (D,)."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    parts = -(-inverse.numel() // constant("block", NAME))
    dx, dw = torch.empty_like(x), x.new_empty(parts, x.shape[-1])
    tensors = (x, weight, inverse, grad, dx, dw)
    loaded(NAME).norm_backward(*map(pointer, tensors), *_sizes(x))
    return dx, dw.sum(0)


def quantize(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes of x (..., D), or of its RMS norm by the weight (D,), as float32, and their scale (..., 1).

    The last one is 1 / sqrt(mean(x^2) + eps), (..., 1), where there is a norm.
    """
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    codes, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    inverse = None if weight is None else torch.empty_like(scale)
    tensors = (x, weight, codes, scale, inverse)
    loaded(NAME).quantize(*map(pointer, tensors), ctypes.c_double(eps), *_sizes(x))
    return codes, scale, inverse


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """(product * row_scale) * column_scale, in place; product (..., D), scales (..., 1) and (1,) or (D,)."""
    tensors = (product, row_scale.contiguous(), column_scale.contiguous())
    loaded(NAME).rescale(*map(pointer, tensors), *_sizes(product, column_scale.numel()))
    return product


def _sizes(x: Tensor, *more: int) -> list[ctypes.c_int64]:
    """Rows and columns of x (..., D), more numbers, and the threads."""
    width = x.shape[-1]
    return sizes(x.numel() // width if width else 0, width, *more)
