"""The ternary finish on a toy language: it recovers what conversion loses, and everything it writes agrees."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frankenstein.artifact import digests, new_folder, open_folder, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import load_encoder
from frankenstein.quantization.artifact import load_latent, load_packed
from frankenstein.quantization.embedding import PackedTernaryEmbedding
from frankenstein.quantization.options import QuantizeOptions
from frankenstein.text.options import TokenizerOptions
from frankenstein.text.shards import SPLITS, RowWriter
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.options import OptimizerOptions, TrainingOptions
from frankenstein.training.pretrain import pretrain
from frankenstein.training.ternary import quantize_encoder, strengths

VOCAB = 29
MODEL = ModelOptions(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    retention_heads=2,
    ffn_hidden_size=48,
    layer_pattern=("standard_attn",),
)
VERBS = {"ana": "canta", "beto": "corre", "carla": "duerme", "dario": "lee"}
FINISH = QuantizeOptions(steps=40, lr=5e-3)


def training(tmp: Path, **changes: Any) -> TrainingOptions:
    settings: dict[str, Any] = {
        "batch_size": 16,
        "max_length": 16,
        "scheduler_total_steps": 150,
        "eval_every_n_steps": 75,
        "checkpoint_every_n_steps": 20,
        "csv_log_path": str(tmp / "logs" / "pretrain.csv"),
        "optimizer": OptimizerOptions("adamw", {"adamw-lr": 1e-2}),
    }
    return TrainingOptions(**{**settings, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, token rows, and two encoders, one ternary, of a language in which every name has its verb."""
    root = tmp_path_factory.mktemp("inputs")
    texts = [f"{a} {VERBS[a]} hoy {b} {VERBS[b]}" for a, b in product(VERBS, VERBS)] * 12
    tokenizer = Tokenizer.train(
        texts, root / "tokenizer", options=TokenizerOptions(byte_fallback=False), vocab_size=VOCAB, seed=0
    )
    stream = np.concatenate([[*tokenizer.encode(text), tokenizer.sep_id] for text in texts])
    with new_folder(root / "tokens", "tokens") as folder:
        splits = {}
        for split in SPLITS:
            writer = RowWriter(folder, split, tokenizer, 16, 1 << 20)
            writer.add(stream)
            writer.close()
            splits[split] = {"rows": writer.rows, "shards": writer.shards}
        write_json(
            folder / "config.json",
            {"max_length": 16, "vocab_size": tokenizer.vocab_size, "dtype": "uint16", "splits": splits},
        )
    for name, use_bitnet in (("encoder", False), ("bitnet", True)):
        options = ModelOptions(**{**vars(MODEL), "use_bitnet": use_bitnet})
        pretrain(
            seed=0,
            threads=1,
            model_options=options,
            training_options=training(root),
            tokens=root / "tokens",
            tokenizer=root / "tokenizer",
            out=root / name,
            resume=root / "resume",
            metrics=root / f"{name}.json",
            curve=root / f"{name}.csv",
        )
    return root


def quantize(inputs: Path, tmp: Path, options: QuantizeOptions, encoder: str = "encoder") -> dict[str, Any]:
    return quantize_encoder(
        seed=0,
        threads=1,
        options=options,
        training_options=training(tmp),
        encoder=inputs / encoder,
        tokens=inputs / "tokens",
        out=tmp / "quantized",
        resume=tmp / "resume",
        metrics=tmp / "quantize.json",
        curve=tmp / "quantize.csv",
    )


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("finished")
    quantize(inputs, tmp, FINISH)
    return tmp


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantize.json").read_text())


def test_weights_are_phased_in_before_activations():
    assert [strengths(step, 4) for step in range(5)] == [(0.5, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (1.0, 1.0)]
    assert strengths(0, 0) == (1.0, 1.0)


def test_the_finish_recovers_most_of_what_conversion_loses(finished):
    valid = report(finished)["valid"]
    assert sorted(valid) == ["full", "packed", "ptq", "qat"]
    lost, left = valid["ptq"]["loss"] - valid["full"]["loss"], valid["qat"]["loss"] - valid["full"]["loss"]
    assert lost > 0.05 and left < 0.5 * lost


def test_the_packed_model_equals_the_trained_one(finished):
    found = report(finished)
    assert found["packed_max_difference"] == 0.0
    assert found["valid"]["packed"] == found["valid"]["qat"]
    latent, packed = load_latent(finished / "quantized" / "latent"), load_packed(finished / "quantized" / "packed")
    ids = torch.arange(32).view(2, 16) % VOCAB
    assert torch.equal(packed(ids), latent(ids))


def test_the_report_has_the_size_table_and_no_times(finished, inputs):
    found = report(finished)
    sizes = found["size_bytes"]["ternary_layers"]
    assert sizes["theory"] < sizes["base3"] < sizes["two_bit"] < sizes["packed"] < sizes["float16"] < sizes["float32"]
    assert sizes["weights"] == 32 * 96 + 32 * 32 + 2 * 32 * 48
    parameters = load_encoder(inputs / "encoder").parameters()
    assert found["size_bytes"]["model"]["parameters"] == sum(p.numel() for p in parameters)
    assert 0.1 < found["zero_share"] < 0.6
    assert sorted(found) == ["packed_max_difference", "size_bytes", "valid", "zero_share"]


def test_the_curve_and_the_folder_are_complete_and_no_checkpoints_are_left(finished):
    lines = (finished / "quantize.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss") and len(lines) == 1 + 40
    assert sorted(p.name for p in (finished / "quantized").iterdir()) == ["latent", "manifest.json", "packed"]
    assert open_folder(finished / "quantized" / "latent", "encoder")["bitnet"] == {"scale": "channel", "norm": False}
    assert not (finished / "resume").exists() or not any((finished / "resume").rglob("*"))


def test_the_same_inputs_give_the_same_bytes(inputs, finished, tmp_path):
    quantize(inputs, tmp_path, FINISH)
    assert digests(tmp_path / "quantized") == digests(finished / "quantized")
    assert report(tmp_path) == report(finished)


def test_zero_steps_pack_the_converted_encoder_as_it_is(inputs, tmp_path):
    options = QuantizeOptions(steps=0, embeddings="float32", scale="tensor", backend="reference")
    found = quantize(inputs, tmp_path, options)
    assert found["valid"]["ptq"] == found["valid"]["qat"] == found["valid"]["packed"]
    assert found["packed_max_difference"] == 0.0
    latent = load_latent(tmp_path / "quantized" / "latent")
    full = load_encoder(inputs / "encoder")
    assert all(torch.equal(latent.state_dict()[name], value) for name, value in full.state_dict().items())


def test_a_ternary_encoder_is_packed_without_training(inputs, tmp_path):
    found = quantize(inputs, tmp_path, FINISH, encoder="bitnet")
    assert sorted(found["valid"]) == ["packed", "qat"]
    assert found["packed_max_difference"] == 0.0
    before, after = load_latent(inputs / "bitnet"), load_latent(tmp_path / "quantized" / "latent")
    for name, value in before.blocks.state_dict().items():
        assert torch.equal(after.blocks.state_dict()[name], value)


def test_the_finish_trains_the_embedding_table_ternary_where_that_is_asked_for(inputs, tmp_path):
    found = quantize(inputs, tmp_path, QuantizeOptions(steps=40, lr=5e-3, embeddings="ternary"))
    assert found["packed_max_difference"] == 0.0 and found["valid"]["packed"] == found["valid"]["qat"]
    assert found["valid"]["qat"]["loss"] < found["valid"]["ptq"]["loss"]
    packed = load_packed(tmp_path / "quantized" / "packed")
    assert isinstance(packed.embedding, PackedTernaryEmbedding)
    before, after = load_encoder(inputs / "encoder"), load_latent(tmp_path / "quantized" / "latent")
    assert not torch.equal(after.embedding.latent, before.embedding.weight)
    with pytest.raises(FrankensteinError, match="the table was trained in full precision"):
        quantize(inputs, tmp_path, QuantizeOptions(embeddings="ternary"), encoder="bitnet")


def test_a_table_that_was_pretrained_ternary_stays_so(inputs, tmp_path):
    options = ModelOptions(**{**vars(MODEL), "use_bitnet": True, "use_bitnet_embedding": True})
    (tmp_path / "inputs").mkdir()
    pretrain(
        seed=0,
        threads=1,
        model_options=options,
        training_options=training(tmp_path, scheduler_total_steps=5),
        tokens=inputs / "tokens",
        tokenizer=inputs / "tokenizer",
        out=tmp_path / "inputs" / "bitnet",
        resume=tmp_path / "resume",
        metrics=tmp_path / "pretrain.json",
        curve=tmp_path / "pretrain.csv",
    )
    (tmp_path / "inputs" / "tokens").symlink_to(inputs / "tokens")
    found = quantize(tmp_path / "inputs", tmp_path, FINISH, encoder="bitnet")
    assert found["packed_max_difference"] == 0.0
    assert isinstance(load_packed(tmp_path / "quantized" / "packed").embedding, PackedTernaryEmbedding)


def test_without_ternary_weights_only_the_full_encoder_is_written(inputs, tmp_path):
    found = quantize(inputs, tmp_path, QuantizeOptions(weights="none"))
    assert list(found["valid"]) == ["full"]
    assert sorted(p.name for p in (tmp_path / "quantized").iterdir()) == ["full", "manifest.json"]
    assert digests(tmp_path / "quantized" / "full") == digests(inputs / "encoder")
    with pytest.raises(FrankensteinError, match="was trained ternary"):
        quantize(inputs, tmp_path, QuantizeOptions(weights="none"), encoder="bitnet")


def test_an_interrupted_finish_ends_in_the_same_bytes(inputs, finished, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("frankenstein.training.ternary.pack", stop)
        quantize(inputs, tmp_path, FINISH)
    assert not (tmp_path / "quantized").exists() and any((tmp_path / "resume").rglob("model.safetensors"))
    last = max((tmp_path / "resume").rglob("rolling-*"))
    for file in sorted(last.iterdir()):  # as if the process had died before its last checkpoint
        file.unlink()
    quantize(inputs, tmp_path, FINISH)
    assert digests(tmp_path / "quantized") == digests(finished / "quantized")
