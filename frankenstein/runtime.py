"""Process-wide torch settings that reproducible runs need."""

import os

import torch


def prepare_torch(threads: int) -> None:
    """Fix the thread count (it changes the bits of a result) and refuse nondeterministic operations."""
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(True)
    # A debugging aid that torch switches on along with it: every fresh buffer is filled with NaN first (5 % of a step).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
