"""What the training loop asks of the thing that is trained."""

from typing import Any, Protocol

from torch import Tensor, nn

from frankenstein.errors import FrankensteinError


class Objective(Protocol):
    """What is trained: where batches come from, and their loss."""

    def batch(self, step: int, micro: int) -> Any:
        """One micro-batch, on the CPU: a pure function of its arguments; step and micro count from 0."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss (0-dim) and detached 0-dim values to log.

        The value "terms" is the number of terms in the mean, by which accumulated micro-batches are weighted (absent:
        all the same); "tokens" is the number of real tokens. Both are integers on the CPU, so that nobody waits for the
        device to know them. "accuracy" is a share; "loss" replaces the loss in the log.
        """
        ...

    def share(self, batch: Any) -> Any:
        """The part of a micro-batch that this one of several processes takes; all parts together are the batch."""
        raise FrankensteinError(
            f"{type(self).__name__} cannot be trained by several processes; start it without torchrun"
        )

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Called before every optimizer step, also the first after a resume."""
        return None  # noqa: RET501  a body makes the method optional for classes that inherit

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Values of the validation set, called in evaluation mode without gradients; "loss" decides which is best."""
        return {}

    def sampled_loss(self, model: nn.Module, batch: Any, seed: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `loss`, but with labels drawn from the model's own distribution; what is drawn depends on `seed` alone.

        For optimizers that estimate the Hessian. The value "loss" is that of the true labels.
        """
        raise FrankensteinError(f"{type(self).__name__} has no labels to sample, which this optimizer needs")

    def origin(self, step: int, micro: int) -> list[dict[str, Any]]:
        """For each row of a micro-batch where it comes from, ready for JSON; read when a step went wrong."""
        return []

    def recipe(self) -> dict[str, Any] | None:
        """What `replay` needs to build the loss again, ready for JSON; None where it cannot."""
        return None
