"""Model FLOPs of a training step, and the rate of matrix products that they are compared with.

    FLOPs = 6 (w t + h m)       w matrix entries that every token passes, t tokens; h those that only the m masked ones
                                do: the output head, and the last layer's feed-forward unless it has experts
    MFU   = FLOPs / seconds / measured peak
Source: Chowdhery et al. 2022 (PaLM), appendix B, https://arxiv.org/abs/2204.02311. Where we differ and why: the peak is
that of a large matrix product measured on this machine, since a CPU's is not documented; and products of activations
with each other (softmax attention's 12 D T a layer, states of recurrent mixers) are left out, since every mixer has its
own. So the number is a lower bound that compares runs of one machine.
"""

import time
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from frankenstein.model.encoder import Encoder
from frankenstein.model.moe import MixtureOfExperts

_SMALLEST, _LARGEST = 128, 8192
_LONG_ENOUGH_S = 0.02


class Passed(NamedTuple):
    """Matrix entries that are multiplied: with every token, and only with those whose labels are predicted."""

    token: float
    prediction: float

    def training_flops(self, tokens: float, predictions: float) -> float:
        """FLOPs of forward and backward pass: 2 a matrix entry forward, 4 backward."""
        return 6.0 * (self.token * tokens + self.prediction * predictions)


def passed_entries(model: nn.Module) -> Passed | None:
    """The entries of an encoder; of its experts only the chosen ones, of its looped layers each traversal.

    None for other models, whose structure is not known.
    """
    if not isinstance(model, Encoder):
        return None
    blocks = sum(_entries(block) for block in model.blocks) * model.options.num_loops
    last = model.blocks[-1].ffn
    late = 0.0 if isinstance(last, MixtureOfExperts) else _entries(last)  # type: ignore[arg-type]
    table = model.embedding.weight.shape[1]
    factor = table * model.options.hidden_size if model.options.tie_embeddings and _factorized(model) else 0
    head = model.vocab_size * (table if model.options.tie_embeddings else model.options.hidden_size) + factor
    return Passed(blocks - late + _entries(model.embedding_stream), head + late)


def _factorized(model: Encoder) -> bool:
    return model.embedding_stream.table_width is not None


def _entries(module: nn.Module) -> float:
    """Entries of all matrices below a module; a matrix that layers share counts in each."""
    if isinstance(module, MixtureOfExperts):
        return module.router.numel() + module.top_k / len(module.experts) * sum(map(_entries, module.experts))
    own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
    return own + sum(_entries(child) for child in module.children())


@cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the best of three products of square matrices that are so large that one takes 20 ms.

    Waits for the device, and draws no random numbers.
    """
    size = _SMALLEST
    while (seconds := _product_seconds(size, device, dtype)) < _LONG_ENOUGH_S and size < _LARGEST:
        size *= 2
    best = min(seconds, *(_product_seconds(size, device, dtype) for _ in range(2)))
    return 2.0 * size**3 / best


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
    with torch.no_grad():
        torch.mm(matrix, matrix)  # what the first call of a size sets up is not counted
        _wait(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
