"""Optimizers, one file each; parameter groups; the prefix contract. `OPTIMIZERS` is the registry."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`OPTIMIZERS`, loaded at first use, so that reading the contract imports no torch."""
    if name != "OPTIMIZERS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from frankenstein.optimizers.base import OPTIMIZERS

    return OPTIMIZERS
