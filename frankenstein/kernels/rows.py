"""Norm and quantization of rows on a CPU, in C (`rows.c`). The callers have the same in torch operations."""

import ctypes

import torch
from torch import Tensor

from frankenstein.kernels.halves import half_bits, place, usable_in
from frankenstein.kernels.native import constant, loaded, pointer, sizes

NAME = "rows"


def usable(*tensors: Tensor, half: bool = False) -> bool:
    """As `usable_in`, for these kernels."""
    return usable_in(NAME, *tensors, half=half)


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm of x (..., D) by the weight (D,), and 1 / sqrt(mean(x^2) + eps), (..., 1)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    tensors = (x, weight, y, inverse)
    loaded(NAME).norm_forward(*map(pointer, tensors), ctypes.c_double(eps), *_sizes(x))
    return y, inverse


def norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D), in its dtype, and of the weight (D,); grad and x may be bfloat16."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    parts = -(-inverse.numel() // constant("block", NAME))
    dx, dw = torch.empty_like(x), weight.new_empty(parts, x.shape[-1])
    places = (place(x), pointer(weight), pointer(inverse), place(grad), place(dx), pointer(dw))
    loaded(NAME).norm_backward(*places, ctypes.c_int64(half_bits(x, grad, dx)), *_sizes(x))
    return dx, dw.sum(0)


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh(alpha x) * weight + bias; x (..., D), alpha (1,), weight and bias (D,)."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    loaded(NAME).tanh_forward(*map(pointer, (x, alpha, weight, bias, y)), *_sizes(x))
    return y


def dynamic_tanh_gradients(
    grad: Tensor, x: Tensor, alpha: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (..., D), alpha (1,), the weight and the bias (D,)."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    width = x.shape[-1]
    parts = x.new_empty(-(-x.numel() // (width * constant("block", NAME))), 3, width)
    dx = torch.empty_like(x)
    loaded(NAME).tanh_backward(*map(pointer, (x, alpha, weight, grad, dx, parts)), *_sizes(x))
    d_weight, d_bias, d_alpha = parts.sum(0).unbind()
    return dx, d_alpha.sum().reshape(1), d_weight, d_bias


def quantize(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes of x (..., D), or of its RMS norm by the weight (D,), in `dtype`, and their scale (..., 1).

    The last one is 1 / sqrt(mean(x^2) + eps), (..., 1), where there is a norm. x and the codes may be bfloat16.
    """
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    codes, scale = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    inverse = None if weight is None else torch.empty_like(scale)
    places = (place(x), pointer(weight), place(codes), pointer(scale), pointer(inverse))
    half = ctypes.c_int64(half_bits(x, None, codes))
    loaded(NAME).quantize(*places, ctypes.c_double(eps), half, *_sizes(x))
    return codes, scale, inverse


def ternarize(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 of a weight (out, in), in float32 or bfloat16, and the scale of every row, (out,)."""
    weight = weight.contiguous()
    codes, scale = torch.empty_like(weight, dtype=dtype), weight.new_empty(len(weight))
    places = (pointer(weight), place(codes), pointer(scale))
    loaded(NAME).ternarize(*places, ctypes.c_int64(half_bits(None, None, codes)), *_sizes(weight))
    return codes, scale


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """(product * row_scale) * column_scale, in place.

    Args: product: (..., D), may be bfloat16; row_scale: (..., 1); column_scale: (1,) or (D,).
    """
    return _rescale(product, row_scale, column_scale, product)


def dequantize(codes: Tensor, row_scale: Tensor) -> Tensor:
    """codes (..., D), may be bfloat16, times row_scale (..., 1), rounded to the dtype of the codes."""
    return _rescale(codes, row_scale, row_scale.new_ones(1), torch.empty_like(codes))


def _rescale(x: Tensor, row_scale: Tensor, column_scale: Tensor, y: Tensor) -> Tensor:
    row_scale, column_scale = row_scale.contiguous(), column_scale.contiguous()
    places = (place(x), pointer(row_scale), pointer(column_scale), place(y))
    half = ctypes.c_int64(half_bits(x, None, y))
    loaded(NAME).rescale(*places, half, *_sizes(x, column_scale.numel()))
    return y


def _sizes(x: Tensor, *more: int) -> list[ctypes.c_int64]:
    """Rows and columns of x (..., D), more numbers, and the threads."""
    width = x.shape[-1]
    return sizes(x.numel() // width if width else 0, width, *more)
