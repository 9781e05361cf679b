"""The registry of optimizers, and the check of arguments that all of them share."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from frankenstein.optimizers.contract import CONTRACTS, check_arguments
from frankenstein.registry import Registry

OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", "frankenstein.optimizers", announced=tuple(CONTRACTS))


def check_group(name: str, group: Mapping[str, Any]) -> None:
    """Raise FrankensteinError for an unknown or senseless argument in a parameter group (torch takes any key)."""
    check_arguments(name, {key: value for key, value in group.items() if key not in ("params", "name")})
