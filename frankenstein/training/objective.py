"""What the training loop asks of the thing that is trained."""

from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """What is trained: where batches come from, and their loss."""

    def batch(self, step: int, micro: int) -> Any:
        """One micro-batch, on the CPU: a pure function of its arguments; step and micro count from 0."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss (0-dim) and detached 0-dim values to log.

        The value "terms" is the number of terms in the mean, by which accumulated micro-batches are weighted (absent:
        all the same); "tokens" is the number of real tokens, "accuracy" a share.
        """
        ...

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Called before every optimizer step, also the first after a resume."""
        return None  # noqa: RET501  a body makes the method optional for classes that inherit

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Values of the validation set, called in evaluation mode without gradients; "loss" decides which is best."""
        return {}
