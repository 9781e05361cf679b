"""Rotary positions on a CPU, in C (`rotary.c`, where the equations stand)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from frankenstein.kernels.halves import half_bits, usable_in
from frankenstein.kernels.native import constant, loaded, pointer, sizes

NAME = "rotary"


def usable(x: Tensor) -> bool:
    """Whether the kernel takes x (B, T, H, K)."""
    return usable_in(NAME, x, half=True) and x.shape[-1] <= constant("widest", NAME)


def rotate(x: Tensor, table: Tensor, *, split: bool) -> Tensor:
    """x (B, T, H, K), float32 or bfloat16, turned by table (T, K / 2, 2), float32: to the same shape and type."""
    y: Tensor = _Rotation.apply(x, table, split)
    return y


class _Rotation(torch.autograd.Function):
    """The gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, split: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.split = split
        return _rotate(x, angles, split, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return _rotate(grad, angles, ctx.split, back=True), None, None


def _rotate(x: Tensor, angles: Tensor, split: bool, *, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()  # heads and tokens may lie anywhere
    y = torch.empty(x.shape, dtype=x.dtype)
    strides = x.stride()[:3]
    numbers = sizes(*x.shape, *strides, int(split), int(back), half_bits(x, None, y))
    loaded(NAME).rotate(ctypes.c_void_p(x.data_ptr()), pointer(angles), ctypes.c_void_p(y.data_ptr()), *numbers)
    return y
