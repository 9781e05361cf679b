"""Process-wide torch settings that reproducible runs need."""

import torch


def prepare_torch(threads: int) -> None:
    """Fix the thread count (it changes the bits of a result) and refuse nondeterministic operations."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
