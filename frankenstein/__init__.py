"""Frankenstein: sequence mixers, optimizers and ternary encoders in one reproducible pipeline.

Importing the package imports no torch; each public name is loaded at first use.
"""

import os
from importlib import import_module
from typing import Any

# OpenMP threads that spin while they wait starve each other on a busy machine; libgomp reads this when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
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
