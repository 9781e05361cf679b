import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import frankenstein as fk
from frankenstein.artifact import ArtifactError, digests
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import load_encoder, read_config, save_encoder
from frankenstein.quantization.convert import convert_to_bitlinear

IDS = torch.arange(5, 17).view(2, 6)


def small() -> Encoder:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=40, hidden_size=16, num_layers=2, ffn_hidden_size=24, mixers={"retnet": {"chunk_size": 3}}
    )
    return Encoder(options, max_length=32).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_encoder(small(), tmp_path / "encoder", tokenizer=b"pieces", max_length=32)
    return tmp_path / "encoder"


def rewrite(folder: Path, name: str, write) -> None:
    """Change a file and its digest, as a program with a fault would."""
    write(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = digests(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_saved_encoder_comes_back_bit_for_bit(saved: Path) -> None:
    before, state = small()(IDS), torch.get_rng_state()
    loaded = fk.load_encoder(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(IDS), before) and not loaded.training
    assert loaded.options == small().options and loaded.max_length == 32
    assert (saved / "tokenizer.model").read_bytes() == b"pieces"


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save_encoder(small(), tmp_path / "again", tokenizer=b"pieces", max_length=32)
    for file in sorted(saved.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_config_says_what_a_reader_needs(saved: Path) -> None:
    config = read_config(saved)
    assert config["model"]["hidden_size"] == 16 and config["model"]["mixers"] == {"retnet": {"chunk_size": 3}}
    assert config["vocab_size"] == 40 and config["max_length"] == 32
    assert config["tokenizer"] == {"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    assert config["sentence"] is None and config["bitnet"] is None and config["kind"] == "encoder"


def test_ternary_latents_load_only_with_a_preparation(tmp_path: Path) -> None:
    latent = convert_to_bitlinear(small())
    bitnet = {"scale": "channel", "norm": True}
    save_encoder(latent, tmp_path / "latent", tokenizer=b"", max_length=32, bitnet=bitnet)
    with pytest.raises(
        ArtifactError, match="latent: holds the latent weights of a ternary encoder; expected full precision"
    ):
        load_encoder(tmp_path / "latent")
    loaded = load_encoder(
        tmp_path / "latent", lambda encoder, config: convert_to_bitlinear(encoder, **config["bitnet"])
    )
    assert torch.equal(loaded(IDS), latent(IDS))


def test_truncated_weights_are_refused_by_name(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: \d+ bytes, the manifest says \d+"):
        load_encoder(saved)
    rewrite(saved, "model.safetensors", lambda f: None)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not readable as safetensors"):
        load_encoder(saved)


def test_every_wrong_tensor_is_listed_at_once(saved: Path) -> None:
    def spoil(file: Path) -> None:
        state = load_file(file)
        del state["head.bias"]
        state["surplus"] = torch.zeros(1)
        state["final_norm.weight"] = torch.ones(3)
        state["embedding.weight"] = state["embedding.weight"].half()
        save_file(state, file, metadata={"format": "pt"})

    rewrite(saved, "model.safetensors", spoil)
    with pytest.raises(ArtifactError) as error:
        load_encoder(saved)
    text = str(error.value)
    assert "lacks head.bias; has an unexpected surplus" in text
    assert "final_norm.weight is float32 (3,), expected float32 (16,)" in text
    assert "embedding.weight is float16 (40, 16), expected float32 (40, 16)" in text


def test_configs_of_another_version_are_refused(saved: Path) -> None:
    def add(file: Path) -> None:
        config = json.loads(file.read_text())
        config["model"]["new_option"] = 1
        file.write_text(json.dumps(config))

    def drop(file: Path) -> None:
        config = json.loads(file.read_text())
        del config["vocab_size"]
        file.write_text(json.dumps(config))

    rewrite(saved, "config.json", add)
    with pytest.raises(ArtifactError, match=r"config\.json: unknown model options new_option"):
        load_encoder(saved)
    rewrite(saved, "config.json", drop)
    with pytest.raises(ArtifactError, match=r"config\.json: lacks vocab_size"):
        load_encoder(saved)


def test_a_folder_of_another_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder; expected a encoder"):
        load_encoder(tmp_path / "nothing")
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "kind": "packed_encoder"}))
    with pytest.raises(ArtifactError, match="is a packed_encoder artifact; expected encoder"):
        load_encoder(saved)
