"""Artifact folders: written whole or not at all, with a manifest of digests that every reader checks.

A folder holds data files, `config.json` (what a reader needs to use them) and `manifest.json` (kind, format version,
size and sha256 of every other file). Nothing that varies from run to run stands in it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from frankenstein.errors import FrankensteinError

MANIFEST = "manifest.json"
CONFIG = "config.json"
FORMAT = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ArtifactError(FrankensteinError):
    """An artifact folder is missing, damaged, or of another kind than was asked for."""


class DiskFullError(ArtifactError, OSError):
    """There is no room for a file or a folder; `strerror` is what the system said."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} could not be written: {reason}. Make room and run again")
        self.strerror = reason


@contextmanager
def _one_message(path: Path) -> Iterator[None]:
    """The same error, whichever writer found the disk full."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _no_room(error)) is None:
            raise
        raise DiskFullError(path, reason) from error


def _no_room(error: BaseException | None) -> str | None:
    """What the system said if it had no room, also where torch raised an error of its own while it closed the file."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return error.strerror
        said = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        code = int(said[1]) if said else error.errno if isinstance(error, OSError) else None
        if code in _NO_ROOM:
            return os.strerror(code)
        error = error.__context__
    return None


def write_json(path: str | Path, value: Any) -> None:
    """JSON with sorted keys and a final newline, put in place by an atomic rename."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """UTF-8 text, put in place by an atomic rename; DiskFullError where there is no room."""
    target = Path(path)
    with _one_message(target):
        _write_text(target, text)


def _write_text(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> Any:
    """JSON of a file; ArtifactError names the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: not readable JSON ({error})") from None


@contextmanager
def new_folder(path: str | Path, kind: str, config: dict[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path`, with its manifest, when the block ends without an error.

    An earlier folder at `path` stays untouched until then. Args: kind: what the folder is, checked by `open_folder`;
    config: written as config.json (a block may also write it itself).
    Raises:
        DiskFullError: when there is no room for it.
    """
    target = Path(path)
    with _one_message(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield temporary
            if config is not None:
                write_json(temporary / CONFIG, config)
            write_json(temporary / MANIFEST, {"kind": kind, "format": FORMAT, "files": digests(temporary)})
            temporary.chmod(0o755)
            _swap(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _swap(temporary: Path, target: Path) -> None:
    """Put `temporary` at `target`; an earlier target is moved aside first and removed last."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    target.rename(aside / "old")
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative name -> size in bytes and sha256, of every file but the folder's own manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_folder(path: str | Path, *kinds: str) -> dict[str, Any]:
    """Check an artifact folder whole and return its config.json (with "kind" added).

    Raises:
        ArtifactError: when the folder or a file is missing, a size or digest differs, or the kind is not of `kinds`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected a {' or '.join(kinds)} artifact")
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: has no {MANIFEST}, so it is no artifact of this pipeline or is incomplete")
    manifest = read_json(folder / MANIFEST)
    if not _is_manifest(manifest):
        raise ArtifactError(f"{folder / MANIFEST}: damaged; expected kind, format and files")
    if manifest["format"] != FORMAT:
        raise ArtifactError(f"{folder}: artifact format {manifest['format']}, this version reads {FORMAT}")
    if kinds and manifest["kind"] not in kinds:
        raise ArtifactError(f"{folder}: is a {manifest['kind']} artifact; expected {' or '.join(kinds)}")
    for name, want in manifest["files"].items():
        _check_file(folder / name, want)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return {**config, "kind": manifest["kind"]}


def _is_manifest(value: Any) -> bool:
    if not isinstance(value, dict) or not {"kind", "format", "files"} <= value.keys():
        return False
    files = value["files"]
    return isinstance(files, dict) and all(
        isinstance(want, dict) and {"bytes", "sha256"} <= want.keys() for want in files.values()
    )


def _check_file(file: Path, want: dict[str, Any]) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file}: missing, though the manifest lists it")
    size = file.stat().st_size
    if size != want["bytes"]:
        raise ArtifactError(
            f"{file}: {size} bytes, the manifest says {want['bytes']}; the file is damaged or was changed"
        )
    if sha256(file) != want["sha256"]:
        raise ArtifactError(f"{file}: its sha256 differs from the manifest; the file is damaged or was changed")
