"""The registry of optimizers, the check of arguments that all of them share, and the base of those written here."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.contract import CONTRACTS, check_arguments
from frankenstein.registry import Registry

OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", "frankenstein.optimizers", announced=tuple(CONTRACTS))


def check_group(name: str, group: Mapping[str, Any]) -> None:
    """Raise FrankensteinError for an unknown or senseless argument in a parameter group (torch takes any key)."""
    check_arguments(name, {key: value for key, value in group.items() if key not in ("params", "name")})


class Method(Optimizer):
    """Base of the optimizers written here: checked arguments, also per group, and one walk over the groups.

    A subclass gives `name` (its key in CONTRACTS) and `update`. An argument whose value is None stands for "absent".
    Args:
        params: parameters or groups of them.
        arguments: constructor argument -> value for all groups that do not give their own.
    Raises:
        FrankensteinError: for an unknown argument or a senseless value, by its name.
    """

    name: ClassVar[str]
    flags: ClassVar[tuple[str, ...]] = ()  # boolean group keys that the training sets, not the prefix contract

    def __init__(self, params: ParamsT, arguments: dict[str, Any]) -> None:
        self._check(arguments)
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check({key: value for key, value in param_group.items() if key not in ("params", "name")})
        super().add_param_group(param_group)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        for flag in self.flags:
            if not isinstance(arguments.get(flag, True), bool):
                raise FrankensteinError(f"{self.name}: {flag}: found {arguments[flag]!r}; expected true or false")
        given = {key: value for key, value in arguments.items() if value is not None and key not in self.flags}
        check_arguments(self.name, given)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients are only read.

        Returns: what the closure returned (called once, with gradients on), or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if members:
                self.update(group, members)
        return loss

    @abstractmethod
    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        """Move the members (all with a gradient) of one group; state goes to `self.state[p]` and to the group."""
