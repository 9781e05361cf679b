"""frankenstein.artifact: folders are whole or absent, and damage is named."""

import json
from pathlib import Path

import pytest

from frankenstein.artifact import ArtifactError, new_folder, open_folder, read_json, write_json


def make(path: Path, text: str = "hola") -> Path:
    with new_folder(path, "tokenizer", {"vocab_size": 3}) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")
    return path


def test_a_folder_opens_with_its_config_and_kind(tmp_path: Path) -> None:
    assert open_folder(make(tmp_path / "x"), "tokenizer") == {"vocab_size": 3, "kind": "tokenizer"}
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["a.txt", "config.json", "sub/b.txt"]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_an_error_inside_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "x", "first")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "x", "tokenizer") as folder:
        (folder / "a.txt").write_text("second")
        raise RuntimeError
    assert (tmp_path / "x" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with new_folder(tmp_path / "x", "tokens") as folder:
        (folder / "c.txt").write_text("c")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["c.txt", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: (x / "a.txt").unlink(), "missing, though the manifest lists it"),
        (lambda x: (x / "a.txt").write_text("holaa"), "5 bytes, the manifest says 4"),
        (lambda x: (x / "a.txt").write_text("hols"), "its sha256 differs"),
        (lambda x: (x / "manifest.json").write_text("{"), "not readable JSON"),
        (lambda x: (x / "manifest.json").write_text("[]"), "damaged; expected kind, format and files"),
        (lambda x: (x / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    folder = make(tmp_path / "x")
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        open_folder(folder, "tokenizer")


def test_another_kind_or_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a tokenizer artifact; expected tokens or encoder"):
        open_folder(make(tmp_path / "x"), "tokens", "encoder")
    with pytest.raises(ArtifactError, match="no such folder"):
        open_folder(tmp_path / "y", "tokens")


def test_json_round_trips_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1.5, "a": ["ñ"]})
    assert read_json(tmp_path / "a.json") == {"a": ["ñ"], "b": 1.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
