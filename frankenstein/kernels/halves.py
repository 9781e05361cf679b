"""What the C kernels that read and write bfloat16 share (`halves.h`)."""

import ctypes

import torch
from torch import Tensor

from frankenstein.kernels.native import available, pointer


def usable_in(name: str, *tensors: Tensor, half: bool = False) -> bool:
    """Whether the kernels of `<name>.c` take these: float32 (with `half`, also bfloat16) on the CPU.

    Not while torch.compile traces, which fuses on its own.
    """
    if torch.compiler.is_compiling():
        return False
    kinds = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return all(x.dtype in kinds and x.device.type == "cpu" for x in tensors) and available(name)


def place(x: Tensor) -> ctypes.c_void_p:
    """Address of a contiguous float32 or bfloat16 tensor."""
    return pointer(x, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)


def half_bits(first: Tensor | None, second: Tensor | None, written: Tensor) -> int:
    """The kernels' argument `half`: bit 0, 1 and 2, set where that tensor is bfloat16."""
    given = (first, second, written)
    return sum(1 << bit for bit, x in enumerate(given) if x is not None and x.dtype == torch.bfloat16)
