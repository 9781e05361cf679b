"""FASA's attention on chosen keys on a CPU, in C (`selected_keys.c`, where the equations stand); forward only."""

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.kernels.native import available, constant, loaded, pointer, sizes

NAME = "selected_keys"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernel takes these: on the CPU, at most float32, no gradient wanted, torch.compile not at work."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    return all(x.is_cpu and x.dtype != torch.float64 for x in tensors) and available(NAME)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, channels: Tensor, *, count: int, causal: bool, scale: float
) -> Tensor:
    """Softmax attention of every query on the `count` keys with the highest dot products in some channels.

    Args:
        q, k: (T, H, K), of one example.
        v: (T, H, V).
        channels: (H, C), those that choose.
        causal: query i chooses among the keys j <= i.
        scale: of the dot products of all channels.
    Returns:  (T, H, V), in the dtype of v.
    """
    length, heads, _ = q.shape
    lanes, panel = constant("lanes", NAME), constant("panel", NAME)
    count, stride = min(count, length), -(-length // panel) * panel
    query, key, value = (x.detach().float().transpose(0, 1) for x in (q, k, v))
    a, b = (x.gather(-1, channels[:, None].expand(-1, length, -1)) for x in (query, key))
    b = F.pad(b, (0, 0, 0, stride - length)).unflatten(1, (-1, panel)).mT.contiguous()
    query = query * (scale * math.log2(math.e))
    query, key, value = (F.pad(x, (0, -x.shape[-1] % lanes)).contiguous() for x in (query, key, value))
    o = torch.empty_like(value)
    kernels = loaded(NAME)
    kernels.work_size.restype = ctypes.c_int64
    each = kernels.work_size(*(ctypes.c_int64(n) for n in (stride, count)))
    tensors = (a, b, query, key, value, o, query.new_empty(torch.get_num_threads(), each))
    shape = (heads, length, channels.shape[1], stride, key.shape[-1], value.shape[-1], count, int(causal))
    kernels.selected_attention(*map(pointer, tensors), *sizes(*shape))
    return o[..., : v.shape[-1]].transpose(0, 1).to(v.dtype)
