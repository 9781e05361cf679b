"""Process-wide torch settings that reproducible runs need."""

import ctypes
import os
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT = (1 << 31) - 1  # bytes of free memory that stay with the process
_LARGEST = 1 << 25  # bytes of a block from the heap; glibc takes no more


def prepare_torch(threads: int) -> None:
    """Fix the thread count (it changes the bits of a result) and refuse nondeterministic operations."""
    torch.set_num_threads(threads)
    _keep_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(True)
    # A debugging aid that torch switches on along with it: every fresh buffer is filled with NaN first (5 % of a step).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _keep_memory() -> None:
    """Tell glibc to keep freed memory: given back and fetched again, every step pays for its page faults (15 %)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that a matrix product of x takes here: that of autocast, or its own. Autocast leaves float64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
