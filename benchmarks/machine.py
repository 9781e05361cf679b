"""What a stored figure was measured on, and how a process measures itself."""

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, cores, threads and versions; no host names, no paths."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    kernels = {"triton": _version("triton"), "fla-core": _version("fla-core")} if torch.cuda.is_available() else {}
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512": "avx512f" in flags,
        "amx": "amx_tile" in flags,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **kernels,
    }


def _version(package: str) -> str | None:
    """Of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def paired(first: Callable[[], object], second: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Median seconds of two calls that take turns, after one warm-up of each."""
    times: list[list[float]] = [[], []]
    for turn in range(runs + 1):
        for record, work in zip(times, (first, second), strict=True):
            taken = seconds(work, device)
            if turn:
                record.append(taken)
    return [median(record) for record in times]


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once: what memory grows by with T.

    Exact and free of noise, unlike the process's peak, in which the allocator's kept pages hide what a layer needs.
    """
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output itself would keep its own graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()  # its graph keeps the storages alive, so that no address comes twice
    del kept
    return sum(storages.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
