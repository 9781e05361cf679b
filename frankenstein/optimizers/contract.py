"""The prefix contract: which `<class>-<suffix>` keys each optimizer class takes, and what they become. No torch.

Every class takes the families it has (lr, wd, betas, eps), each for all parameters (`adamw-lr`) or for one group
(`adamw-lr_norms`), and the suffixes of its own that its method defines (see methods.py).
Source: Transformer Encoder Frankenstein, sections 3.4-3.5 (the prefix contract and its seven groups).
"""

import math
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.methods import CONTRACTS, FAMILIES, GROUPS, Contract, Schema
from frankenstein.options import plain
from frankenstein.registry import UnknownNameError, nearest

_MEANINGS = {
    "lr": "Learning rate",
    "wd": "Weight decay",
    "betas": "Decay rates of the moving averages",
    "eps": "Added to the denominator",
}


def contract(name: str) -> Contract:
    """The contract of a class; UnknownNameError lists the known names."""
    if name not in CONTRACTS:
        raise UnknownNameError(
            f"unknown optimizer {name!r}; known: {', '.join(sorted(CONTRACTS))}{nearest(name, list(CONTRACTS))}"
        )
    return CONTRACTS[name]


def parameters_schema(name: str) -> Schema:
    """JSON Schema of `training.optimizer.parameters` for one class; every key has a title and a description."""
    rules = contract(name)
    properties: Schema = {}
    for family, default in rules.families.items():
        what, schema = _MEANINGS[family], rules.family_schema(family)
        properties[f"{name}-{family}"] = {
            **_labels(family, f"{what}, all groups."),
            **schema,
            "default": plain(default),
        }
        for group in GROUPS:
            labels = _labels(f"{family}_{group}", f"{what} of the group {group}; overrides {name}-{family}.")
            properties[f"{name}-{family}_{group}"] = {**labels, **rules.family_schema(family)}
    for suffix, schema in rules.own.items():
        properties[f"{name}-{suffix}"] = {**_labels(suffix, ""), **schema}
    return {
        "type": "object",
        "additionalProperties": False,
        "x-prefix-rule": prefix_rule(name),
        "properties": properties,
    }


def _labels(suffix: str, description: str) -> Schema:
    return {"title": suffix.replace("_", " ").capitalize(), "description": description}


def prefix_rule(name: str) -> str:
    """One sentence: which keys the class takes, and which families its method does not have."""
    rules = contract(name)
    families = ", ".join(f"{name}-{family}" for family in rules.families)
    own = "".join(f", {name}-{suffix}" for suffix in rules.own)
    lacking = [family for family in FAMILIES if family not in rules.families]
    lacks = f"; {name} has no {' and no '.join(lacking)}" if lacking else ""
    return (
        f"The keys of {name} are {families} (each for all groups, or with _embeddings, _norms, _ode, _retnet, _mamba, "
        f"_attention or _other for one){own}{lacks}."
    )


def split(name: str, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The keys of `training.optimizer.parameters` as constructor arguments.

    Returns: the arguments for all groups, and for each group those that override them.
    Raises:
        FrankensteinError: naming the key, for one that the class does not have, or whose value makes no sense.
    """
    properties = parameters_schema(name)["properties"]
    common: dict[str, Any] = {}
    by_group: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in parameters.items():
        if key not in properties:
            raise FrankensteinError(f"training.optimizer.parameters.{key}: {_foreign(name, key)}")
        _check(f"training.optimizer.parameters.{key}", value, properties[key])
        suffix = key.removeprefix(f"{name}-")
        family, _, group = suffix.partition("_")
        target = by_group[group] if family in FAMILIES and group in by_group else common
        argument = FAMILIES.get(family, family) if target is not common or suffix in FAMILIES else suffix
        target[argument] = tuple(value) if isinstance(value, list) else value
    return common, by_group


def _foreign(name: str, key: str) -> str:
    """Why a key is none of this class."""
    prefix, dash, _ = key.partition("-")
    known = list(parameters_schema(name)["properties"])
    if not dash:
        hint = f"; write {name}-{key}" if f"{name}-{key}" in known else ""
        return f"the class name is missing from the key{hint}. {prefix_rule(name)}"
    if prefix != name and prefix in CONTRACTS:
        return f"a key of {prefix}, but optimizer_class is {name}. {prefix_rule(name)}"
    return f"not a key of {name}{nearest(key, known)}. {prefix_rule(name)}"


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise FrankensteinError for a constructor argument that the class does not have, or with a senseless value."""
    rules = contract(name)
    schemas = {FAMILIES[family]: rules.family_schema(family) for family in rules.families} | dict(rules.own)
    for argument, value in arguments.items():
        if argument not in schemas:
            known = ", ".join(schemas)
            raise FrankensteinError(
                f"{name} has no argument {argument!r}{nearest(argument, list(schemas))}; known: {known}"
            )
        _check(f"{name}: {argument}", value, schemas[argument])


def _check(where: str, value: Any, schema: Schema) -> None:
    fault = next(Draft202012Validator(schema).iter_errors(plain(value)), None)
    if fault is not None:
        raise FrankensteinError(f"{where}: found {value!r}: {fault.message}")
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise FrankensteinError(f"{where}: found {value!r}: expected a finite number")
