"""Losses on the sentence vectors of a batch of pairs. A further loss is one function and one entry of LOSSES."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from frankenstein.errors import NotBuiltYetError
from frankenstein.registry import UnknownNameError, nearest

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cosine_regression(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the cosine of each pair against its target.

        L = mean((cos(e1, e2) - y)^2)
    Source: Transformer Encoder Frankenstein, section 7; Reimers and Gurevych 2019, section 3,
    https://arxiv.org/abs/1908.10084.
    Args:
        first, second: (B, D).
        targets: (B,), the wanted cosines in [-1, 1].
    """
    return F.mse_loss(F.cosine_similarity(first, second, dim=-1), targets)


LOSSES: dict[str, PairLoss] = {"cosine": cosine_regression}
ANNOUNCED_LOSSES = ("cosent", "mnrl", "softmax", "matryoshka", "distillation")


def pair_loss(name: str) -> PairLoss:
    """The loss of this name. Raises: NotBuiltYetError: for a loss that the contract names and this version lacks."""
    if name in LOSSES:
        return LOSSES[name]
    known = ", ".join(sorted(LOSSES))
    if name in ANNOUNCED_LOSSES:
        raise NotBuiltYetError(f"sentence loss {name!r} is not built yet; built: {known}")
    raise UnknownNameError(f"unknown sentence loss {name!r}; known: {known}{nearest(name, sorted(LOSSES))}")
