"""How several processes train one model: each on its share of every micro-batch, their gradients added up.

    g = (W / N) mean_r sum_i n_ri g_ri        W processes r; n_ri terms in r's share of micro-batch i; N = sum n_ri
A share's mean is weighted by its terms, so the gradient, and all that is logged, is that of one process with the whole
batch, to rounding. Dropout differs (processes draw for their own rows), and so does what is computed from all tokens of
a pass at once: the balance loss and the capacity of experts, which here see one share.
Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError
from frankenstein.training.options import TrainingOptions
from frankenstein.training.processes import ALONE, Processes


class Parallel:
    """A model that one process trains; the subclasses are for several.

    `model` is the model itself, for its state and names; only what goes through `call` is known to the others.
    """

    whole = True  # every process has all weights

    def __init__(self, model: nn.Module, processes: Processes = ALONE) -> None:
        self.model, self.processes = model, processes

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments), a forward pass."""
        return function(self.model, *arguments)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch; only the last one of a step has its gradients added up."""
        yield

    def divide_gradients(self, total: Tensor) -> None:
        """Make the mean of weighted gradients; `total` is the sum of all weights, of all processes."""
        divisor = total / self.processes.size if self.processes.several else total
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.div_(divisor)

    def clear_gradients(self, optimizer: Optimizer) -> None:
        """Before a step."""
        optimizer.zero_grad(set_to_none=True)

    def adopt(self, optimizer: Optimizer) -> None:
        """Take a new optimizer, which has not stepped yet."""

    def optimized(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters, as the optimizer has them."""
        yield from self.model.named_parameters()

    def weights(self) -> dict[str, Tensor] | None:
        """Whole weights, on the CPU, where the model of a process has parts; all take part. None: they are in it."""
        return None

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Its state_dict, of whole tensors; all take part."""
        return optimizer.state_dict()

    def load(self, file: Path, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take the weights of a file, and an optimizer's state."""
        load_model(self.model, str(file))
        optimizer.load_state_dict(state)


class Pass(nn.Module):
    """Any use of a model as one forward call, as wrappers want it; the head, say, is no part of an encoder's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments)."""
        return function(self.model, *arguments)


class Replicated(Parallel):
    """Every process has the whole model; gradients are averaged in buckets while the backward pass still runs.

    Every trainable parameter must get a gradient in every step, as those of an encoder do (an idle expert gets zeros):
    looking for unused ones would cost a walk over the graph a step.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        super().__init__(model, processes)
        # Buffers of encoders are constants.
        self._wrapped = DistributedDataParallel(Pass(model), forward_sync_buffers=False, gradient_as_bucket_view=True)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments), a forward pass."""
        if not torch.is_grad_enabled():
            return function(self.model, *arguments)
        return self._wrapped(function, *arguments)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay here until the last micro-batch."""
        if last:
            yield
            return
        with self._wrapped.no_sync():
            yield


def check_parallel(options: TrainingOptions, processes: Processes) -> None:
    """Whether these processes can train with these options.

    Raises:
        FrankensteinError: when there are more processes than rows to share out, or the optimizer cannot be sharded.
    """
    if not processes.several:
        return
    if options.batch_size < processes.size:
        raise FrankensteinError(
            f"training.batch_size is {options.batch_size}, shared by {processes.size} processes; "
            "expected at least one row for each"
        )
    if options.distributed == "fsdp2":
        from frankenstein.training.sharded import check_sharding

        check_sharding(options)


def parallel_training(model: nn.Module, options: TrainingOptions, processes: Processes) -> Parallel:
    """The way of training that the options ask for, when there are several processes.

    Args:
        model: the same weights in every process, on its device.
    """
    if not processes.several:
        return Parallel(model)
    if options.distributed == "fsdp2":
        from frankenstein.training.sharded import Sharded  # its imports take a second

        return Sharded(model, processes)
    return Replicated(model, processes)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in place."""
    part: Tensor = tensor if type(tensor) is Tensor else tensor.to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, put together; all take part."""
    together: Tensor = tensor if type(tensor) is Tensor else tensor.full_tensor()  # type: ignore[attr-defined]
    return together
