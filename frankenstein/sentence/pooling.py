"""Token vectors to one sentence vector. Padding never counts.

Source: Reimers and Gurevych 2019, section 3, https://arxiv.org/abs/1908.10084.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from frankenstein.errors import FrankensteinError
from frankenstein.registry import nearest


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens. Args: hidden: (B, T, D); mask: (B, T) bool, True = real. Returns: (B, D) float32."""
    real = hidden.float().masked_fill(~mask.unsqueeze(-1), 0.0)
    return real.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def cls_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Vector of the first real token, which is [CLS]. Shapes as in `mean_pool`."""
    first = mask.int().argmax(1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, first].float() * mask.any(1, keepdim=True)


def max_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Largest value of each feature over the real tokens. Shapes as in `mean_pool`."""
    real = hidden.float().masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)
    return torch.where(mask.any(1, keepdim=True), real, torch.zeros_like(real))


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_pool, "cls": cls_pool, "max": max_pool}


def sentence_vectors(hidden: Tensor, mask: Tensor, pooling: str, normalize: bool) -> Tensor:
    """Pooled and, if asked for, unit-length sentence vectors in float32 whatever the type of `hidden`.

    Args:
        hidden: (B, T, D).
        mask: (B, T) bool, True = real; a row without real tokens gives zeros.
    Returns:  (B, D).
    Raises:   FrankensteinError: for an unknown pooling.
    """
    if pooling not in POOLINGS:
        known = sorted(POOLINGS)
        raise FrankensteinError(f"unknown pooling {pooling!r}; known: {', '.join(known)}{nearest(pooling, known)}")
    vectors = POOLINGS[pooling](hidden, mask)
    return F.normalize(vectors, dim=-1) if normalize else vectors
