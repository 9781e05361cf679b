"""Frozen options classes: default, bounds, unit and meaning of each knob, and the JSON Schema made from them."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def option(
    default: Any, description: str, *, title: str = "", not_built: dict[str, Any] | None = None, **schema: Any
) -> Any:
    """One field of a frozen options class.

    Args:
        default: the value used when the key is absent; a dict or options class becomes a fresh copy.
        description: what it does, with its unit.
        title: label in forms; made from the field's name when empty.
        not_built: a JSON Schema of the values this version refuses with a clear "not built yet".
        **schema: further JSON Schema keywords (minimum, enum, items, ...).
    """
    metadata = {"description": description, "title": title, "not_built": not_built, "schema": schema}
    if isinstance(default, dict) or (isinstance(default, type) and dataclasses.is_dataclass(default)):
        factory = default if isinstance(default, type) else lambda: dict(default)
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _type_schema(hint: Any) -> dict[str, Any]:
    """JSON Schema of a field's type: scalars, `X | None`, `tuple[X, ...]`, `dict[str, X]`, nested options classes."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return json_schema(hint)
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = _type_schema(next(a for a in args if a is not type(None)))
        return {**inner, "type": [inner["type"], "null"]}
    if origin is tuple:
        return {"type": "array", "items": _type_schema(args[0])}
    if origin is dict:
        return {"type": "object"}
    raise TypeError(f"no JSON Schema for the type {hint!r}")


def json_schema(cls: type) -> dict[str, Any]:
    """JSON Schema 2020-12 object for an options class; every field has a title, a description and a default."""
    hints = typing.get_type_hints(cls)
    properties = {}
    for f in dataclasses.fields(cls):
        entry = _type_schema(hints[f.name])
        nested = entry.get("type") == "object" and "properties" in entry
        entry = {
            "title": f.metadata["title"] or f.name.replace("_", " ").capitalize(),
            "description": f.metadata["description"],
            **entry,
            **f.metadata["schema"],
        }
        if not nested:
            entry["default"] = plain(default_of(f))
        if f.metadata["not_built"] is not None:
            entry["x-not-built-yet"] = f.metadata["not_built"]
        properties[f.name] = entry
    return {"type": "object", "additionalProperties": False, "properties": properties}


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default value of one dataclass field."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def plain(value: Any) -> Any:
    """Options as plain dicts and lists, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def build(cls: type[T], values: dict[str, Any]) -> T:
    """An options object from validated plain values; absent keys take their defaults."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        return tuple(_convert(args[0], v) for v in value)
    if origin is dict:
        return plain(value)
    return hint(value) if hint in (int, float) else value
