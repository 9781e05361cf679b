"""How the C kernels are built, kept and done without."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from frankenstein.kernels import native
from frankenstein.mixers.tiled_scan import tiled_scan

needs_compiler = pytest.mark.skipif(not native.available("selective_scan"), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache folder, and nothing loaded."""
    monkeypatch.setenv(native.CACHE, str(tmp_path / "kernels"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def scan_once() -> torch.Tensor:
    torch.manual_seed(0)
    u, dt, B, C = torch.randn(2, 9, 8), torch.rand(2, 9, 8), torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    return tiled_scan(u, dt, -torch.rand(8, 4), B, C)[0]


@needs_compiler
def test_it_is_compiled_once_and_then_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library("selective_scan") is not None
    (built,) = (tmp_path / "kernels").iterdir()
    assert built.suffix == ".so"
    native.library.cache_clear()
    monkeypatch.setattr(native, "FLAGS", ("-this-is-no-flag",))
    assert native.library("selective_scan") is None, "other flags are another build"
    monkeypatch.undo()
    monkeypatch.setenv(native.CACHE, str(tmp_path / "kernels"))
    native.library.cache_clear()
    before = built.stat().st_mtime_ns
    assert native.library("selective_scan") is not None
    assert [f.stat().st_mtime_ns for f in (tmp_path / "kernels").iterdir()] == [before]


def test_without_a_compiler_torch_gives_the_same_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = scan_once()
    native.library.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(scan_once(), expected, rtol=1e-5, atol=1e-6)
        scan_once()
    assert [r.message for r in caplog.records] == [
        "no C compiler (cc, gcc, clang) found: selective_scan runs on torch operations, several times slower"
    ]


@needs_compiler
def test_a_failing_compiler_is_named_with_what_it_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-include", "/no/such/header.h"))
    with caplog.at_level(logging.WARNING):
        assert not native.available("selective_scan")
    (record,) = caplog.records
    assert "torch operations" in record.message and "/no/such/header.h" in record.message
    assert list((tmp_path / "kernels").iterdir()) == [], "nothing half-built"


def test_the_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert not native.available("selective_scan")


@needs_compiler
def test_a_cache_folder_that_cannot_be_made_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(native.CACHE, str(tmp_path / "file" / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.available("selective_scan")


def test_only_what_the_kernels_can_read_is_passed_to_them() -> None:
    for x in (torch.zeros(3, dtype=torch.float64), torch.zeros(4, 4).T):
        with pytest.raises(ValueError, match=r"expected a contiguous torch.float32 tensor on the CPU, found"):
            native.pointer(x)
