"""Seams for optimizers that need more of the training loop than `step`.

The loop, its evaluation and its checkpoints call these for every optimizer; for one without such needs they do nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeGuard, runtime_checkable

from torch.optim import Optimizer


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that trains at other weights than those it is evaluated at."""

    @property
    def averaged(self) -> bool:
        """Whether the parameters now hold the weights for evaluation."""

    def train(self) -> None:
        """Put the training weights into the parameters."""

    def eval(self) -> None:
        """Put the weights for evaluation into the parameters."""


@runtime_checkable
class HessianBased(Protocol):
    """An optimizer that squares the gradient of a loss with sampled labels, every update_k steps."""

    @property
    def update_k(self) -> int:
        """Steps between estimates."""

    def update_hessian(self) -> None:
        """Take the estimate from the parameters' gradients."""


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters hold the weights to evaluate, save and pack; after it, also after an error, those before.

    What was saved inside is a pair: a state_dict from here belongs to weights from here. Training goes on from such a
    pair after `training_weights`.
    """
    if not isinstance(optimizer, Averaging) or optimizer.averaged:
        yield
        return
    try:
        optimizer.eval()
        yield
    finally:
        optimizer.train()


def training_weights(optimizer: Optimizer) -> None:
    """Let the parameters hold the training weights, whichever the loaded checkpoint had."""
    if isinstance(optimizer, Averaging):
        optimizer.train()


def wants_hessian(optimizer: Optimizer, step: int) -> TypeGuard[HessianBased]:
    """Whether an estimate is due before the step that follows `step` finished ones: the last of each update_k steps."""
    return isinstance(optimizer, HessianBased) and step % optimizer.update_k == optimizer.update_k - 1
