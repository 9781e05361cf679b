"""Fully sharded training: every process holds a part of each weight, of its gradient and of the optimizer's state.

A layer's weights are gathered when it runs and let go afterwards; gradients are averaged into the parts. The optimizer
works on the parts as on tensors of their own, which is the same step where it is elementwise; methods that need a whole
matrix or a sum over it are refused. Checkpoints hold whole tensors, so that any number of processes may go on.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import Mixer
from frankenstein.optimizers.contract import contract
from frankenstein.optimizers.methods import CONTRACTS
from frankenstein.training.options import TrainingOptions
from frankenstein.training.parallel import Parallel, Pass
from frankenstein.training.processes import Processes


def check_sharding(options: TrainingOptions) -> None:
    """Raise FrankensteinError for options that need more than a part of a tensor."""
    optimizer = options.optimizer
    found = "training.distributed is fsdp2, and training."
    if not contract(optimizer.optimizer_class).elementwise:
        elementwise = ", ".join(name for name, rules in CONTRACTS.items() if rules.elementwise)
        raise FrankensteinError(
            f"{found}optimizer.optimizer_class is {optimizer.optimizer_class}, which needs whole tensors; "
            f"expected ddp, or one of {elementwise}"
        )
    if options.use_galore:
        raise FrankensteinError(f"{found}use_galore is true, which needs whole matrices; expected ddp, or false")
    if options.compile:
        raise FrankensteinError(f"{found}compile is true, which is not tried with it; expected ddp, or false")
    if options.use_amp and options.amp_dtype == "float16":
        raise FrankensteinError(f"{found}amp_dtype is float16; expected ddp, or bfloat16")


class Sharded(Parallel):
    """Every process has a part of the model: of each weight, some of its first dimension.

    Args:
        model: the same weights in every process; its list `blocks` is gathered block by block.
    """

    whole = False

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        super().__init__(model, processes)
        mesh = init_device_mesh(next(model.parameters()).device.type, (processes.size,))
        for block in model.blocks:  # type: ignore[union-attr]
            if not _read_by_others(block):  # else it is gathered with the root, for the whole pass
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self._wrapped: Any = fully_shard(Pass(model), mesh=mesh, reshard_after_forward=True)
        assert isinstance(self._wrapped, FSDPModule)
        self._parts = {parameter: nn.Parameter(_part(parameter)) for parameter in model.parameters()}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments), a forward pass."""
        return self._wrapped(function, *arguments)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay whole and here until the last micro-batch."""
        self._wrapped.set_requires_gradient_sync(last)
        yield

    def divide_gradients(self, total: Tensor) -> None:
        """Make the mean of weighted gradients, for the optimizer's parts, too."""
        for parameter, part in self._parts.items():
            if parameter.grad is not None:
                part.grad = _part(parameter.grad)
                part.grad.div_(total / self.processes.size)

    def clear_gradients(self, optimizer: Optimizer) -> None:
        """Of the parameters and of the parts."""
        optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def adopt(self, optimizer: Optimizer) -> None:
        """Give a new optimizer the parts in place of the parameters."""
        for group in optimizer.param_groups:
            group["params"] = [self._parts[parameter] for parameter in group["params"]]

    def optimized(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parts."""
        for name, parameter in self.model.named_parameters():
            yield name, self._parts[parameter]

    def weights(self) -> dict[str, Tensor] | None:
        """Whole weights, on the CPU; all take part."""
        return {name: _gathered(tensor).contiguous() for name, tensor in self.model.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Its state_dict, of whole tensors on the CPU; all take part."""
        saved = optimizer.state_dict()
        numbered = self._numbered(optimizer)
        for index, values in self._states(saved):
            parameter, part = numbered[index]
            for key in sorted(values):
                value = values[key]
                if isinstance(value, Tensor) and value.ndim > 0:
                    _expect(key, value.shape, part.shape)
                    values[key] = _gathered(_like(parameter, value))
        return saved

    def load(self, file: Path, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take this process's part of whole weights and of the optimizer's whole state."""
        weights = load_file(file)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if isinstance(tensor, DTensor):
                    _part(tensor).copy_(_cut(weights[name], tensor))
                else:
                    tensor.copy_(weights[name])
        numbered = self._numbered(optimizer)
        for index, values in self._states(state):
            parameter, _ = numbered[index]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    _expect(key, value.shape, parameter.shape)
                    values[key] = _cut(value, parameter)
        optimizer.load_state_dict(state)

    def _states(self, saved: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        saved["state"] = {index: dict(values) for index, values in saved["state"].items()}
        return sorted(saved["state"].items())

    def _numbered(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters with their parts, as a state_dict numbers them."""
        owner = {part: parameter for parameter, part in self._parts.items()}
        return [(owner[part], part) for group in optimizer.param_groups for part in group["params"]]


def _read_by_others(block: nn.Module) -> bool:
    """Whether other layers use weights of this one."""
    return any(isinstance(module, Mixer) and module.read_by_others for module in block.modules())


def _expect(key: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise FrankensteinError(
            f"optimizer state {key!r}: found shape {tuple(found)}; expected that of its weight, {tuple(expected)}"
        )


def _part(tensor: Any) -> Tensor:
    part: Tensor = tensor.detach().to_local()
    return part


def _like(parameter: Any, part: Tensor) -> DTensor:
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _gathered(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _cut(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that all have."""
    whole = tensor.to(like.device, like.dtype)
    return _part(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))
