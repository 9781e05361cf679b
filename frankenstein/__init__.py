"""Frankenstein: sequence mixers, optimizers and ternary encoders in one reproducible pipeline.

Importing the package imports no torch; each public name is loaded at first use.
"""

import os
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

_SPINS = 30_000  # about 1 ms
_RUNNING = Path("/proc/loadavg")


def _spin_count() -> int:
    """How long OpenMP threads spin before they sleep: not at all where other processes want the cores.

    Waking a thread costs more than a small operation: spinning halves a step at small width on an idle machine. Beside
    other processes spinning threads starve each other. The bits of a result never depend on it.
    """
    try:
        others = []
        for _ in range(5):
            others.append(int(_RUNNING.read_text().split()[3].split("/")[0]) - 1)
            time.sleep(0.001)
    except (OSError, ValueError, IndexError):  # no Linux
        return 0
    return _SPINS if median(others) + 2 <= (os.cpu_count() or 1) else 0


# libgomp reads this when torch loads it.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = str(_spin_count())
# cuBLAS is deterministic only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"

_PUBLIC = {
    "load_params": "params",
    "Params": "params",
    "ParamsError": "params",
    "FrankensteinError": "errors",
    "MIXERS": "mixers.base",
    "OPTIMIZERS": "optimizers.base",
    "NORMS": "model.norms",
    "TASKS": "tasks.registry",
    "build_encoder": "model.encoder",
    "load_encoder": "model.storage",
    "build_optimizer": "optimizers.groups",
    "Tokenizer": "text.tokenizer",
    "convert_to_bitlinear": "quantization.convert",
    "pack": "quantization.artifact",
    "load_packed": "quantization.artifact",
    "SentenceEncoder": "sentence.encoder",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
