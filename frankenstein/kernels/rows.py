"""Norm and quantization of rows on a CPU, in C (`rows.c`). The callers have the same in torch operations."""

import ctypes

import torch
from torch import Tensor

from frankenstein.kernels.native import available, constant, loaded, pointer, sizes

NAME = "rows"
FIRST, SECOND, WRITTEN = 1, 2, 4  # as in rows.c: which matrices are bfloat16


def usable(*tensors: Tensor, half: bool = False) -> bool:
    """Whether the kernels take these: float32 (with `half`, also bfloat16) on the CPU.

    Not while torch.compile traces, which fuses on its own.
    """
    if torch.compiler.is_compiling():
        return False
    kinds = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return all(x.dtype in kinds and x.device.type == "cpu" for x in tensors) and available(NAME)


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
    places = (_place(x), pointer(weight), pointer(inverse), _place(grad), _place(dx), pointer(dw))
    loaded(NAME).norm_backward(*places, _half((x, FIRST), (grad, SECOND), (dx, WRITTEN)), *_sizes(x))
    return dx, dw.sum(0)


def quantize(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes of x (..., D), or of its RMS norm by the weight (D,), in `dtype`, and their scale (..., 1).

    The last one is 1 / sqrt(mean(x^2) + eps), (..., 1), where there is a norm. x and the codes may be bfloat16.
    """
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    codes, scale = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    inverse = None if weight is None else torch.empty_like(scale)
    places = (_place(x), pointer(weight), _place(codes), pointer(scale), pointer(inverse))
    half = _half((x, FIRST), (codes, WRITTEN))
    loaded(NAME).quantize(*places, ctypes.c_double(eps), half, *_sizes(x))
    return codes, scale, inverse


def ternarize(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 of a weight (out, in), in float32 or bfloat16, and the scale of every row, (out,)."""
    weight = weight.contiguous()
    codes, scale = torch.empty_like(weight, dtype=dtype), weight.new_empty(len(weight))
    places = (pointer(weight), _place(codes), pointer(scale))
    loaded(NAME).ternarize(*places, _half((codes, WRITTEN)), *_sizes(weight))
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
    places = (_place(x), pointer(row_scale.contiguous()), pointer(column_scale.contiguous()), _place(y))
    half = _half((x, FIRST), (y, WRITTEN))
    loaded(NAME).rescale(*places, half, *_sizes(x, column_scale.numel()))
    return y


def _place(x: Tensor) -> ctypes.c_void_p:
    return pointer(x, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)


def _half(*matrices: tuple[Tensor, int]) -> ctypes.c_int64:
    """The bits of those that are bfloat16."""
    return ctypes.c_int64(sum(bit for x, bit in matrices if x.dtype == torch.bfloat16))


def _sizes(x: Tensor, *more: int) -> list[ctypes.c_int64]:
    """Rows and columns of x (..., D), more numbers, and the threads."""
    width = x.shape[-1]
    return sizes(x.numel() // width if width else 0, width, *more)
