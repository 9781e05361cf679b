"""params.yaml -> frozen, typed Params. Reading and validating imports no torch.

What is enforced is the committed JSON Schema (`schema/params.schema.yaml`, shipped inside the wheel); rules between
fields stand in the `faults` method of each options class.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from frankenstein.errors import FrankensteinError
from frankenstein.evaluation.options import EvaluateOptions
from frankenstein.model.options import ModelOptions
from frankenstein.options import build, json_schema, option, plain
from frankenstein.quantization.options import QuantizeOptions
from frankenstein.registry import nearest
from frankenstein.sentence.options import ExportOptions, SbertOptions
from frankenstein.text.options import DataOptions, TokenizerOptions
from frankenstein.training.options import TrainingOptions

_PACKAGE = Path(__file__).resolve().parent
SCHEMA_NAME = "params.schema.yaml"


@dataclasses.dataclass(frozen=True)
class Params:
    """One experiment: everything that the pipeline reads."""

    model_class: str = option("frankenstein", "Model family.", enum=["frankenstein"])
    seed: int = option(0, "Seed of every random choice.", minimum=0, maximum=2**31 - 1)
    threads: int = option(2, "CPU threads of torch; the bits of trained weights depend on it.", minimum=1)
    plugins: tuple[str, ...] = option(
        (), "Modules imported first; they may register mixers, norms, optimizers and tasks."
    )
    data: DataOptions = option(DataOptions, "Corpus and evaluation sets.")
    tokenizer: TokenizerOptions = option(TokenizerOptions, "SentencePiece training.")
    model: ModelOptions = option(ModelOptions, "The encoder.")
    training: TrainingOptions = option(TrainingOptions, "Masked-language-model pretraining.")
    quantize: QuantizeOptions = option(QuantizeOptions, "The ternary finish.")
    sbert: SbertOptions = option(SbertOptions, "Sentence fine-tuning.")
    evaluate: EvaluateOptions = option(EvaluateOptions, "Evaluation.")
    export: ExportOptions = option(ExportOptions, "Embedding export.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key path, message) of every broken rule between sections."""
        if self.export.model == "ternary" and self.quantize.weights == "none":
            yield "export.model", "'ternary' needs quantize.weights: ternary (found none)"
        if self.export.model == "full" and self.model.use_bitnet:
            yield (
                "export.model",
                "'full' needs model.use_bitnet: false; a model trained ternary has no full-precision twin",
            )
        if self.quantize.weights == "none" and self.model.use_bitnet:
            yield "quantize.weights", "'none' contradicts model.use_bitnet: true"
        fallback = str(self.tokenizer.byte_fallback).lower()
        floor = 300 if self.tokenizer.byte_fallback else 32
        if self.model.vocab_size < floor:
            yield (
                "model.vocab_size",
                f"{self.model.vocab_size} is too small; tokenizer.byte_fallback: {fallback} needs at least {floor}",
            )


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration."""

    key: str
    message: str
    place: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.place}{self.key or 'params'}: {self.message}"


class ParamsError(FrankensteinError):
    """A configuration is wrong; `faults` lists everything that is."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("\n".join(str(f) for f in faults))


def load_params(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read, validate and type a configuration.

    Args:
        path: a params.yaml; None takes the shipped defaults.
        overrides: values by dotted key, put over the file's before validation.
    Raises:
        ParamsError: naming file, line, column, key, value found and what is allowed, for every fault at once.
    """
    tree = {} if path is None else read_yaml(path)
    values = plain(tree)
    for key, value in (overrides or {}).items():
        _put(values, key, plain(value))
    where = _Places("" if path is None else str(path), tree, set(overrides or {}))
    faults = [Fault(key, text, *where(key)) for key, text in _schema_faults(values)]
    if not faults:
        params = build(Params, values)
        faults = [Fault(key, text, *where(key)) for key, text in _rule_faults(params)]
    if faults:
        raise ParamsError(sorted(faults, key=lambda f: (f.line, f.key)))
    return params


def read_yaml(path: str | Path) -> Any:
    """A YAML 1.2 mapping with line numbers (the rules DVC reads by: 1e-4 is a float, `no` is a string)."""
    file = Path(path)
    try:
        tree = YAML(typ="rt").load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError([Fault(str(file), "no such file; expected a params.yaml")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError([Fault(str(file), f"cannot be read: {error}")]) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        problem = " ".join(str(error.problem).split("\n")[0].split())
        raise ParamsError([Fault(place, f"not valid YAML: {problem}")]) from None
    except YAMLError as error:
        raise ParamsError([Fault(str(file), f"not valid YAML: {error}")]) from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ParamsError(
            [Fault(str(file), f"found {found}; expected a mapping with sections such as model and training")]
        )
    return tree


@cache
def committed_schema() -> dict[str, Any]:
    """The committed schema: `schema/` in a checkout, inside the package in an installation."""
    for folder in (_PACKAGE.parent / "schema", _PACKAGE):
        if (folder / SCHEMA_NAME).is_file():
            schema: dict[str, Any] = yaml.load((folder / SCHEMA_NAME).read_bytes(), Loader=yaml.CSafeLoader)
            return schema
    raise FrankensteinError(f"{SCHEMA_NAME} is missing from the installation; reinstall frankenstein")


def base_schema() -> dict[str, Any]:
    """The schema of the options classes alone, before the registries add their names (see frankenstein.schema)."""
    return json_schema(Params)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ParamsError([Fault(key, f"cannot be overridden: {parent} is not a section")])
    values[last] = value


class _Places:
    """Dotted key -> ('file:line:column: ', line) of the key, or of its nearest parent in the file."""

    def __init__(self, file: str, tree: Any, overridden: set[str]) -> None:
        self.file, self.tree, self.overridden = file, tree, overridden

    def __call__(self, key: str) -> tuple[str, int]:
        if any(key == o or key.startswith(o + ".") for o in self.overridden):
            return "override: ", 0
        node: Any = self.tree
        line = column = 0
        for part in _split(key):
            if isinstance(node, CommentedMap) and part in node:
                line, column = node.lc.key(part)
                node = node[part]
            elif isinstance(node, CommentedSeq) and part.isdigit() and int(part) < len(node):
                line, column = node.lc.item(int(part))
                node = node[int(part)]
            else:
                break
        return (f"{self.file}:{line + 1}:{column + 1}: " if self.file else ""), line + 1


def _split(key: str) -> list[str]:
    return key.replace("[", ".").replace("]", "").split(".")


def _path(parts: list[Any]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _not_built(validator: Any, subschema: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if validator.evolve(schema=subschema).is_valid(instance):
        yield ValidationError(f"{_show(instance)} is not built yet in this version")


def _refuse(validator: Any, rules: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    """Rules across fields or names, each with its own words."""
    for rule in rules:
        if validator.evolve(schema=rule["when"]).is_valid(instance):
            shown = "" if isinstance(instance, dict) else f"{_show(instance)} "
            yield ValidationError(shown + rule["message"])


_Validator = validators.extend(Draft202012Validator, {"x-not-built-yet": _not_built, "x-refuse": _refuse})


def _schema_faults(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    plugins = values.get("plugins")
    schema = committed_schema()
    if isinstance(plugins, list) and plugins and all(isinstance(p, str) for p in plugins):
        faults = list(_import_plugins(plugins))
        if faults:
            yield from faults
            return
        schema = import_module("frankenstein.schema").compose()
    yield from _not_finite(values, [])
    for error in _Validator(schema).iter_errors(values):
        yield from _explain(error)


def _import_plugins(plugins: list[str]) -> Iterator[tuple[str, str]]:
    for i, name in enumerate(plugins):
        try:
            import_module(name)
        except ImportError as error:
            yield f"plugins[{i}]", f"cannot import {name!r}: {error}"


def _not_finite(value: Any, path: list[Any]) -> Iterator[tuple[str, str]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield _path(path), f"found {value}; expected a finite number"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _not_finite(item, [*path, key])


def _rule_faults(params: Params) -> Iterator[tuple[str, str]]:
    yield from params.faults()
    for field in dataclasses.fields(params):
        section = getattr(params, field.name)
        if hasattr(section, "faults"):
            for key, text in section.faults():
                yield f"{field.name}.{key}", text


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(error: ValidationError) -> Iterator[tuple[str, str]]:
    """One fault per wrong thing, in words: what was found, what is allowed, the nearest known name."""
    path, found = list(error.absolute_path), error.instance
    schema: dict[str, Any] = error.schema if isinstance(error.schema, dict) else {}
    wanted: Any = error.validator_value
    key = _path(path)
    if error.validator == "additionalProperties":
        known = list(schema.get("properties", {}))
        for name in dict(found):  # type: ignore[arg-type]
            if name not in known:
                yield _path([*path, name]), _unknown_key(str(name), known, schema, path)
    elif error.validator == "enum":
        allowed = [a for a in wanted if a is not None]
        near = nearest(str(found), [str(a) for a in allowed])
        yield key, f"found {_show(found)}; allowed: {', '.join(str(a) for a in allowed)}{near}"
    elif error.validator == "type":
        names = " or ".join(wanted) if isinstance(wanted, list) else wanted
        yield key, f"found {_show(found)} ({_kind(found)}); expected {names}"
    elif error.validator in _BOUNDS:
        yield key, f"found {_show(found)}; expected {_BOUNDS[str(error.validator)].format(wanted)}"
    else:
        yield key, error.message


_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minItems": "at least {} item(s)",
    "maxItems": "at most {} item(s)",
    "minLength": "a text of at least {} character(s)",
    "uniqueItems": "no item twice",
}


def _unknown_key(name: str, known: list[str], schema: dict[str, Any], path: list[Any]) -> str:
    near = nearest(name, known)
    rule = schema.get("x-prefix-rule")
    if rule:
        return f"not a key of this optimizer. {rule.rstrip('.')}{near}"
    listing = f"; known here: {', '.join(sorted(known))}" if not near or len(known) <= 8 else ""
    return f"unknown key{' in ' + _path(path) if path else ''}{near}{listing}"


def _kind(value: Any) -> str:
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "list"), (dict, "section"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")
