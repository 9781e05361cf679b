"""What the parts of a training share: what is trained, on what, how, and where it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn

from frankenstein.optimizers.modes import HessianBased, wants_hessian
from frankenstein.training.accumulation import Loss
from frankenstein.training.batches import pinned
from frankenstein.training.checkpoints import Checkpoints, RunState, Trained
from frankenstein.training.objective import Objective
from frankenstein.training.parallel import Parallel
from frankenstein.training.precision import Precision
from frankenstein.training.processes import Processes
from frankenstein.training.settings import LoopSettings


@dataclass
class Run:
    """One training, from its first step to its last; `label` names it in messages."""

    label: str
    trained: Trained
    objective: Objective
    settings: LoopSettings
    precision: Precision
    checkpoints: Checkpoints
    parallel: Parallel
    state: RunState = field(default_factory=RunState)

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        return self.parallel.processes

    def batch(self, step: int, micro: int) -> Any:
        """This process's share of a micro-batch."""
        batch = self.objective.batch(step, micro)
        batch = self.objective.share(batch) if self.processes.several else batch
        return pinned(batch) if self.precision.device.type == "cuda" else batch

    def loss(self, step: int) -> Loss:
        """The loss of a step: with sampled labels where the optimizer estimates the Hessian from it."""
        if not wants_hessian(self.trained.optimizer, step):
            return self.objective.loss
        seed = (self.settings.seed, step) if self.processes.first else (self.settings.seed, step, self.processes.rank)
        return sampled(self.objective.sampled_loss, seed)

    def update(self, step: int, terms: int) -> None:
        """Let the optimizer use the gradients of a step: for its Hessian estimate, or to move the weights.

        Args:
            terms: terms in the mean loss of the step.
        """
        optimizer = self.trained.optimizer
        if wants_hessian(optimizer, step):
            optimizer.update_hessian()
            self.state.hessian_terms = terms
        elif isinstance(optimizer, HessianBased) and self.state.hessian_terms > 0:
            optimizer.step(bs=self.state.hessian_terms)  # type: ignore[call-overload]
        else:
            optimizer.step()


def sampled(
    loss: Callable[[nn.Module, Any, tuple[int, ...]], tuple[Tensor, dict[str, Tensor]]], seed: tuple[int, ...]
) -> Loss:
    """A loss with sampled labels whose draws depend on `seed` and the number of the micro-batch alone."""
    micro = count()

    def draw(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(model, batch, (*seed, next(micro)))

    return draw
