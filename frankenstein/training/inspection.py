"""A step that went wrong, run once more under observation: the first bad module, the loss, the gradients.

Source: TORMENTED-BERT-Frankenstein, section 8.4.3.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frankenstein.training.accumulation import Loss, accumulate
from frankenstein.training.module_watch import ModuleWatch
from frankenstein.training.precision import Precision

LARGE = 1000.0
_LISTED = 5


@dataclass(frozen=True)
class Inspection:
    """What a step's second run showed.

    `first_bad` is that of ModuleWatch, or {"module": None, "what": "loss"} where only the loss was not finite; None
    where all was finite. Gradients are those before clipping; `largest` are [parameter, norm] of the largest ones.
    """

    loss: float
    gradient_norm: float
    first_bad: dict[str, Any] | None
    gradients_not_finite: list[str]
    gradients_above_1000: list[str]
    largest: list[tuple[str, float]]

    @property
    def finite(self) -> bool:
        """Whether the second run saw nothing wrong."""
        return self.first_bad is None and not self.gradients_not_finite


def inspect_step(model: nn.Module, batches: Sequence[Any], loss: Loss, precision: Precision) -> Inspection:
    """Forward and backward pass of one step's micro-batches; leaves the gradients, and buffers as they were.

    Args:
        batches: all micro-batches of the step.
        loss: of the step, which the objective has begun.
        precision: of the step, with its scale.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    # Compiled layers would not run the hooks.
    with torch.compiler.set_stance("force_eager"), _same_buffers(model), ModuleWatch(model) as watch:

        def watched(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            with watch.forward_pass():
                return loss(model, batch)

        values = accumulate(model, batches, watched, precision, single=len(batches) == 1)
        _unscale(model, precision)
        first_bad = watch.first_bad()
    mean = float(values["loss"])
    if not math.isfinite(mean) and (first_bad is None or first_bad["what"] != "output"):
        first_bad = {"module": None, "what": "loss"}
    return Inspection(mean, *_gradients(model, first_bad))


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def _unscale(model: nn.Module, precision: Precision) -> None:
    if precision.scaled:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(precision.scaler.get_scale())


def _gradients(model: nn.Module, first_bad: dict[str, Any] | None) -> tuple[Any, ...]:
    """The fields of Inspection from gradient_norm on."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: float(g.norm()) for name, g in found.items()}
    total = float(nn.utils.get_total_norm(list(found.values())))
    bad = [name for name, g in found.items() if not torch.isfinite(g).all()]
    large = [name for name, g in found.items() if g.abs().max() > LARGE]
    finite = sorted(((name, norm) for name, norm in norms.items() if name not in bad), key=lambda x: -x[1])
    return total, first_bad, bad, large, finite[:_LISTED]


def describe(first_bad: dict[str, Any] | None) -> str:
    """One phrase of a finding, for messages."""
    if first_bad is None:
        return "nothing that is not finite"
    if first_bad["module"] is None:
        return "the loss"
    place = f"{first_bad['module']} ({first_bad['type']}), {first_bad['what']} of call {first_bad['call']}"
    if first_bad["what"] != "output":
        return place
    inputs = "finite" if first_bad["input_finite"] else "not finite"
    weights = "finite" if first_bad["weights_finite"] else "not finite"
    counts = f"{first_bad['not_finite']} of {first_bad['of']} values not finite"
    return f"{place}: {counts}, input {inputs}, own weights {weights}"
