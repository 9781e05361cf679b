"""Gradients of one optimizer step from its micro-batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from frankenstein.training.parallel import Parallel
from frankenstein.training.precision import Precision

COUNTS = ("terms", "tokens")  # values of a loss that are counts: summed over micro-batches, not averaged
Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def accumulate(
    model: nn.Module | Parallel, batches: Iterable[Any], loss: Loss, precision: Precision, *, single: bool
) -> dict[str, Tensor]:
    """Add up the gradients of the mean loss over all micro-batches, still scaled, and return the values of the step.

        g = sum_i n_i g_i / sum_i n_i        n_i terms of micro-batch i's mean, all 1 where the loss names none
    Source: Transformer Encoder Frankenstein, section 3.6 (n_i = 1); weighting by terms makes it the gradient of one big
    batch, however the micro-batches' sizes differ. With several processes i also runs over their shares.
    Args:
        model: trained here alone, or together with other processes.
        batches: the micro-batches of one step, taken one after the other.
        single: there is one; in a single process its gradient needs no weights.
    Returns:  the values of the loss, and "loss" where the values have none; counts are sums, the others means.
    """
    parallel = model if isinstance(model, Parallel) else Parallel(model)
    if single and not parallel.processes.several:
        (batch,) = batches
        mean, values = _forward(parallel, batch, loss, precision)
        precision.backward(mean)
        return {"loss": mean.detach(), **values}
    sums: dict[str, Tensor] = {}
    one, share = torch.ones((), device=precision.device), 1.0
    total = torch.zeros((), device=precision.device)
    for index, (batch, last) in enumerate(_marked(batches)):
        with parallel.micro_batch(last=last):
            mean, values = _forward(parallel, batch, loss, precision)
            terms = values.get("terms", one)
            if index == 0 and precision.scaled:  # weights near 1, so that they do not use up float16's range
                share = 1.0 / max(1.0, parallel.processes.sums([float(terms)])[0] / parallel.processes.size)
            weight = terms * share
            precision.backward(mean * weight)
        total = total + weight
        for name, value in {"loss": mean.detach(), **values}.items():
            sums[name] = sums.get(name, 0) + (value if name in COUNTS else value * weight)
    total, sums = _over_processes(parallel, total, sums)
    total = total.clamp(min=share)
    parallel.divide_gradients(total)
    return {name: value if name in COUNTS else value / total for name, value in sums.items()}


def _marked(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each micro-batch, and whether it is the last."""
    rest = iter(batches)
    batch = next(rest)
    for following in rest:
        yield batch, False
        batch = following
    yield batch, True


def _over_processes(parallel: Parallel, total: Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums over all processes; those of counts stay on the CPU."""
    processes = parallel.processes
    if not processes.several:
        return total, sums
    names = [name for name in sums if name not in COUNTS]
    *values, total = processes.sum_tensors([*(sums[name] for name in names), total])
    counts = [name for name in COUNTS if name in sums]
    added = [torch.tensor(number) for number in processes.sums([float(sums[name]) for name in counts])]
    return total, {**dict(zip(names, values, strict=True)), **dict(zip(counts, added, strict=True))}


def _forward(parallel: Parallel, batch: Any, loss: Loss, precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
    with precision.autocast():
        result: tuple[Tensor, dict[str, Tensor]] = parallel.call(loss, batch)
        return result
