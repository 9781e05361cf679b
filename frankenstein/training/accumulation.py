"""Gradients of one optimizer step from its micro-batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from frankenstein.training.precision import Precision

COUNTS = ("terms", "tokens")  # values of a loss that are counts: summed over micro-batches, not averaged
Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def accumulate(
    model: nn.Module, batches: Iterable[Any], loss: Loss, precision: Precision, *, single: bool
) -> dict[str, Tensor]:
    """Add up the gradients of the mean loss over all micro-batches, still scaled, and return the values of the step.

        g = sum_i n_i g_i / sum_i n_i        n_i terms of micro-batch i's mean, all 1 where the loss names none
    Source: Transformer Encoder Frankenstein, section 3.6 (n_i = 1); weighting by terms makes it the gradient of one big
    batch, however the micro-batches' sizes differ.
    Args:
        batches: the micro-batches of one step, taken one after the other.
        single: there is one; its gradient needs no weights.
    Returns:  the values of the loss, and "loss" where the values have none; counts are sums, the others means.
    """
    if single:
        (batch,) = batches
        mean, values = _forward(model, batch, loss, precision)
        precision.backward(mean)
        return {"loss": mean.detach(), **values}
    sums: dict[str, Tensor] = {}
    one, share = torch.ones((), device=precision.device), 1.0
    total = torch.zeros((), device=precision.device)
    for index, batch in enumerate(batches):
        mean, values = _forward(model, batch, loss, precision)
        terms = values.get("terms", one)
        if index == 0 and precision.scaled:  # weights near 1, so that they do not use up float16's range
            share = 1.0 / max(1.0, float(terms))
        weight = terms * share
        precision.backward(mean * weight)
        total = total + weight
        for name, value in {"loss": mean.detach(), **values}.items():
            sums[name] = sums.get(name, 0) + (value if name in COUNTS else value * weight)
    total = total.clamp(min=share)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(total)
    return {name: value if name in COUNTS else value / total for name, value in sums.items()}


def _forward(model: nn.Module, batch: Any, loss: Loss, precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
    with precision.autocast():
        return loss(model, batch)
