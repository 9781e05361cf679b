"""Pretraining with compiled layers, with a real compiler."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.training.compiled import compile_layers
from tests.training.tiny_language import pretrain_tiny, write_language

MODEL = {"layer_pattern": ("standard_attn",), "num_layers": 1}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """compile_layers sets the variable; undone after the test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "not used"))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of TorchInductor itself
def test_a_compiled_training_ends_with_the_same_weights_to_rounding_and_keeps_its_code(tmp_path: Path) -> None:
    write_language(tmp_path)
    plain = pretrain_tiny(tmp_path, tmp_path / "plain", model=MODEL)
    torch._dynamo.utils.counters.clear()
    compiled = pretrain_tiny(tmp_path, tmp_path / "compiled", model=MODEL, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert any((tmp_path / "compiled" / ".compiled").iterdir())
    assert compiled["valid_loss"] == pytest.approx(plain["valid_loss"], abs=1e-5)
    found, wanted = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("compiled", "plain"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_without_gradients_a_layer_runs_as_it_is_written_and_a_missing_compiler_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModelOptions(hidden_size=16, num_heads=2, ffn_hidden_size=24, **MODEL)
    encoder = Encoder(options, vocab_size=30, max_length=8).eval()
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        before = encoder(ids)
        compile_layers(encoder, tmp_path / "code")
        assert torch.equal(encoder(ids), before)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "code")
    assert not list((tmp_path / "code").glob("*/*"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FrankensteinError, match=r"training\.compile: .*no-such-compiler"):
        compile_layers(encoder, tmp_path / "code")
