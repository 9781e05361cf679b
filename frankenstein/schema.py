"""The JSON Schema of params.yaml, from options classes and registries: `python -m frankenstein.schema FILE`."""

import io
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from frankenstein.artifact import write_text
from frankenstein.mixers.base import MIXERS
from frankenstein.model.norms import NORMS
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.contract import parameters_schema
from frankenstein.optimizers.galore import refusal
from frankenstein.options import json_schema
from frankenstein.params import base_schema
from frankenstein.registry import Registry
from frankenstein.tasks.registry import TASKS


def compose() -> dict[str, Any]:
    """The whole schema: options classes, plus the names and the special options that the registries know."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "params.yaml",
        "description": "One frankenstein experiment.",
        **base_schema(),
    }
    sections = {name: section.get("properties", {}) for name, section in schema["properties"].items()}
    sections["model"]["layer_pattern"]["items"] = _names(MIXERS)
    sections["model"]["norm_type"].update(_names(NORMS))
    sections["model"]["mixers"] = _mixers(sections["model"]["mixers"])
    _mixer_rules(schema["properties"]["model"])
    for section in ("evaluate", "sbert"):
        sections[section]["tasks"]["items"] = _names(TASKS)
    _optimizer(sections["training"]["optimizer"])
    schema["properties"]["training"]["x-refuse"] = [_galore_rule(name) for name in OPTIMIZERS if refusal(name)]
    return schema


def _names(registry: Registry[Any]) -> dict[str, Any]:
    """Enum of a registry's names; the announced ones are part of the contract and refused."""
    entry: dict[str, Any] = {"type": "string", "enum": sorted({*registry, *registry.announced})}
    if registry.announced:
        entry["x-not-built-yet"] = {"enum": sorted(registry.announced)}
    return entry


def _mixers(entry: dict[str, Any]) -> dict[str, Any]:
    options = {
        name: {
            "title": name,
            "description": f"Options of the {name} mixer.",
            **json_schema(MIXERS[name].Options),
        }
        for name in MIXERS
    }
    return {**entry, "additionalProperties": False, "properties": options}


def _mixer_rules(model: dict[str, Any]) -> None:
    """What the mixers refuse: training, for those that only run in evaluation, and positions that they cannot use."""
    idle = [name for name in MIXERS if not MIXERS[name].trainable]
    text = "only runs in evaluation; train with standard_attn, then put it in with frankenstein.model.swap.swap_mixer"
    model["properties"]["layer_pattern"]["items"]["x-refuse"] = [{"when": {"enum": idle}, "message": text}]
    default = model["properties"]["layer_pattern"]["default"]
    rules = []
    for value in model["properties"]["positions"]["enum"]:
        refusing = [name for name in MIXERS if value not in MIXERS[name].positions]
        found = [{"required": ["layer_pattern"], "properties": {"layer_pattern": {"contains": {"enum": refusing}}}}]
        if set(default) & set(refusing):
            found.append({"not": {"required": ["layer_pattern"]}})
        when = {"required": ["positions"], "properties": {"positions": {"const": value}}, "anyOf": found}
        taking = ", ".join(name for name in MIXERS if name not in refusing)
        text = f"positions: {value} does not work in every mixer of the layer_pattern; it works in {taking}"
        rules += [{"when": when, "message": text}] if refusing else []
    turning = [name for name in MIXERS if MIXERS[name].takes_use_hope]
    present = {"required": ["layer_pattern"], "properties": {"layer_pattern": {"contains": {"enum": turning}}}}
    when = {"required": ["use_hope"], "properties": {"use_hope": {"const": True}}, "not": present}
    text = f"use_hope: true needs {' or '.join(turning)} in the layer_pattern"
    model["x-refuse"] = [*rules, {"when": when, "message": text}]


def _optimizer(entry: dict[str, Any]) -> None:
    """The prefix contract: which `parameters` keys exist depends on the class."""
    default = entry["properties"]["optimizer_class"]["default"]
    entry["properties"]["optimizer_class"].update(_names(OPTIMIZERS))
    entry["allOf"] = [
        {
            "if": {
                "properties": {"optimizer_class": {"const": name}},
                **({} if name == default else {"required": ["optimizer_class"]}),
            },
            "then": {"properties": {"parameters": parameters_schema(name)}},
        }
        for name in sorted({*OPTIMIZERS, *OPTIMIZERS.announced})
    ]


def _galore_rule(name: str) -> dict[str, Any]:
    """use_galore around an optimizer that it cannot wrap is refused, with the reason."""
    chosen = {"required": ["optimizer_class"], "properties": {"optimizer_class": {"const": name}}}
    values = {"use_galore": {"const": True}, "optimizer": chosen}
    return {"when": {"required": list(values), "properties": values}, "message": refusal(name)}


def render(schema: dict[str, Any]) -> str:
    """The schema as YAML text, as it is committed."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(schema, stream)
    return "# Generated by `make schema` from the options classes; do not edit.\n" + stream.getvalue()


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), render(compose()))
