"""Compiled layers: torch.compile of each layer of an encoder, for its training steps.

Layers are compiled one by one: those of one kind share their code, so that the wait does not grow with depth. What
TorchInductor wrote stays in a folder, where later runs find it. Validation, and the second look at a step that went
wrong, run the layers as they are written.
Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder

logger = logging.getLogger(__name__)
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class _TrainingForward:
    """A layer's forward: compiled where gradients are wanted, as written where not."""

    def __init__(self, forward: Any) -> None:
        self._written, self._compiled = forward, torch.compile(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._written)(*args, **kwargs)


def compile_layers(encoder: Encoder, cache: Path) -> None:
    """Compile every layer of an encoder at its first training step.

    Args:
        encoder: on the device where it trains.
        cache: folder of the compiled code.
    Raises:
        FrankensteinError: where the compiler behind it is missing: of C++ for CPUs, Triton for GPUs.
    """
    _check_compiler(next(encoder.parameters()).device)
    os.environ[_CACHE] = str(cache.absolute())  # torch itself may have set it to its own default already
    logger.info("layers are compiled in the first steps; the code is kept in %s", cache)
    for block in encoder.blocks:
        block.forward = _TrainingForward(block.forward)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise FrankensteinError("training.compile: needs the package triton on a GPU, which is not installed")
        return
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(map(shutil.which, wanted)):
        raise FrankensteinError(f"training.compile: needs a C++ compiler; found none of: {', '.join(wanted)}")
