"""The rules of the house, checked on the source text."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "frankenstein").rglob("*.py"))
STAGES = sorted(p for p in (ROOT / "stages").glob("*.py") if p.stem not in ("__init__", "runner"))
# A room may import itself and everything to its right.
ORDER = [
    "cli",
    "evaluation",
    "sentence",
    "training",
    "optimizers",
    "quantization",
    "model",
    "mixers",
    "kernels",
    "text",
    "inputs",
    "tasks",
    "base",
]
BASE = ("params", "artifact", "registry", "options", "errors", "runtime")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return dotted.removesuffix(".__init__")


def room_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else "base"
    return "base" if part in BASE or module.endswith(".options") else part


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules of this project that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(m for m in found if m.split(".")[0] in ("frankenstein", "stages") and file_of(m) is not None)


def file_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{name(path)}: over 400 lines; is there a wall missing?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{name(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_stages_stay_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_go_downwards_only(path: Path) -> None:
    here = room_of(module_of(path))
    if here in ("ops", "schema", "frankenstein"):  # public faces: nobody in the library imports them
        return
    for module in imports_of(path):
        if module == "frankenstein":
            continue
        there = room_of(module)
        assert not module.startswith("stages"), f"{name(path)} imports {module}"
        assert there in ORDER, f"{name(path)} imports {module}, which only front doors may"
        assert ORDER.index(here) <= ORDER.index(there), f"{name(path)} imports upwards: {module}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_no_string_getattr_no_swallowed_errors_no_print(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            assert not (node.func.id == "getattr" and literal), f"{name(path)}:{node.lineno}: getattr with a string"
            printing = node.func.id == "print" and path.stem != "cli"
            assert not printing, f"{name(path)}:{node.lineno}: print in the library"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            cleanup = broad and isinstance(node.body[-1], ast.Raise)
            assert not broad or cleanup, f"{name(path)}:{node.lineno}: a broad except that does not re-raise"


def pipeline() -> dict:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def closure(stage: Path, sections: set[str]) -> set[Path]:
    """Files a stage imports, directly or through others; a registry counts as its whole folder.

    params.py knows the options of every section; those of sections that the stage does not read cannot matter to it.
    """
    folders = {s.partition(".")[0]: room for s, room in SECTION_ROOM.items()}
    unread = {room for section, room in folders.items() if section not in sections} - {
        room for section, room in folders.items() if section in sections
    }
    seen: set[Path] = set()
    todo = [stage]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        family = [p for p in path.parent.glob("*.py") if p.stem != "__init__"] if registers(path) else []
        reached = [file_of(m) for m in imports_of(path)] + family
        todo += [
            p
            for p in reached
            if p and not (path.name == "params.py" and p.name == "options.py" and p.parent.name in unread)
        ]
    return {p for p in seen if p.name != "__init__.py" or p.read_text().count("import")}


SECTION_ROOM = {
    "data": "text", "tokenizer": "text", "model": "model", "training": "training", "quantize": "quantization",
    "sbert": "sentence", "export": "sentence", "evaluate": "evaluation",
}  # fmt: skip


def registers(path: Path) -> bool:
    """Whether a file creates a registry, so that every file beside it belongs to it."""
    return (
        re.search(r"^\w+: Registry\[.*\] = Registry\(|^\w+ = Registry\(", path.read_text(encoding="utf-8"), re.M)
        is not None
    )


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_dvc_deps_cover_the_code_a_stage_imports(stage: Path) -> None:
    entry = pipeline()[stage.stem]
    deps = [ROOT / d for d in entry["deps"] if "${" not in d]
    sections = {p.partition(".")[0] for p in entry.get("params", []) if isinstance(p, str)}
    missing = sorted(name(f) for f in closure(stage, sections) if not any(f == d or d in f.parents for d in deps))
    assert not missing, f"{stage.stem}: not in its deps: {missing}"


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_dvc_params_are_what_a_stage_reads(stage: Path) -> None:
    if stage.stem == "validate":
        return
    declared = pipeline()[stage.stem].get("params", [])
    reads = set()
    for node in ast.walk(ast.parse(stage.read_text(encoding="utf-8"))):
        chain, value = [], node
        while isinstance(value, ast.Attribute):
            chain.append(value.attr)
            value = value.value
        if chain and isinstance(value, ast.Name) and value.id == "params":
            reads.add(".".join(reversed(chain)))
    reads = {r for r in reads if not any(o.startswith(r + ".") for o in reads)}
    undeclared = sorted(r for r in reads if not any(r == d or r.startswith(d + ".") for d in declared))
    unread = sorted(d for d in declared if not any(r == d or r.startswith(d + ".") for r in reads))
    assert not undeclared, f"{stage.stem} reads {undeclared}, which dvc.yaml does not declare"
    assert not unread, f"dvc.yaml declares {unread} for {stage.stem}, which it does not read"


def test_every_output_is_ignored_by_hand() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for stage, entry in pipeline().items():
        for out in entry.get("outs", []):
            path = out if isinstance(out, str) else next(iter(out))
            cached = isinstance(out, str) or out[path].get("cache", True)
            if cached:
                assert path.startswith("data/") and "/data/*" in ignored, f"{stage}: {path} is not ignored"


@pytest.mark.parametrize("registry", ["MIXERS", "NORMS", "OPTIMIZERS", "TASKS"])
def test_registered_classes_cite_their_source_and_are_tested(registry: str) -> None:
    import frankenstein

    tests = " ".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for key, entry in dict(getattr(frankenstein, registry)).items():
        text = (entry.__doc__ or "") + (sys.modules[entry.__module__].__doc__ or "")
        assert "http" in text, f"{registry}[{key!r}] cites no source"
        assert entry.__name__ in tests or f'"{key}"' in tests, f"{registry}[{key!r}] has no test"


def test_the_committed_schema_is_fresh() -> None:
    from frankenstein.schema import compose, render

    committed = (ROOT / "schema" / "params.schema.yaml").read_text(encoding="utf-8")
    assert committed == render(compose()), "run `make schema` and commit the result"
