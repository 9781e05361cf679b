"""The packed artifact: equal to the trained model, small, and refused with one message when it is damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frankenstein.artifact import MANIFEST, ArtifactError, digests, read_json, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import save_encoder
from frankenstein.quantization.artifact import load_latent, load_packed, pack, to_packed
from frankenstein.quantization.bitlinear import set_strength
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear, ternary_layers
from frankenstein.quantization.embedding import Int8Embedding, round_embeddings
from frankenstein.quantization.report import size_report, zero_share
from frankenstein.quantization.runtime import BACKENDS, PackedTernaryLinear

OPTIONS = ModelOptions(vocab_size=50, hidden_size=20, num_layers=2, num_heads=2, retention_heads=2, ffn_hidden_size=30)


def ternary_encoder(scale: str = "channel", norm: bool = True) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(OPTIONS, max_length=24)
    with torch.no_grad():  # larger than the initialization, so that a wrong weight shows in the output
        for p in encoder.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return convert_to_bitlinear(encoder, scale=scale, norm=norm).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pack(ternary_encoder(), tmp_path / "packed", tokenizer=b"spm", sentence={"pooling": "mean"})
    return tmp_path / "packed"


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, 7:] = False
    mask[2, :3] = False
    return ids, mask


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Change tensors, and the manifest with them, as a faulty writer would."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "files": digests(folder)})


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("norm", [True, False])
def test_the_packed_encoder_equals_the_trained_one_bit_for_bit_in_every_backend(scale, norm, tmp_path):
    encoder = ternary_encoder(scale, norm)
    round_embeddings(encoder.embedding)
    pack(encoder, tmp_path / "packed")
    ids, mask = batch()
    expected = encoder(ids, mask)
    for backend in ("auto", *BACKENDS):
        packed = load_packed(tmp_path / "packed", backend)
        got = packed(ids, mask)
        assert torch.equal(got, expected), backend
        assert torch.equal(packed.mlm_logits(got[0]), encoder.mlm_logits(expected[0])), backend


def test_float32_embeddings_need_no_rounding_to_be_equal(tmp_path):
    encoder, (ids, mask) = ternary_encoder(), batch()
    pack(encoder, tmp_path / "packed", embeddings="float32")
    assert torch.equal(load_packed(tmp_path / "packed")(ids, mask), encoder(ids, mask))


def test_int8_embeddings_stay_close_without_rounding(folder):
    encoder, (ids, mask) = ternary_encoder(), batch()
    got, expected = load_packed(folder)(ids, mask), encoder(ids, mask)
    cosine = torch.cosine_similarity(got[mask], expected[mask], dim=-1)
    assert cosine.min() > 0.99


def test_a_packed_encoder_has_no_float_master_no_gradients_and_is_in_evaluation_mode(folder):
    packed = load_packed(folder)
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    assert not ternary_layers(packed) and isinstance(packed.embedding, Int8Embedding)
    largest = max(t.numel() for t in (*packed.parameters(), *packed.buffers()) if t.is_floating_point())
    assert largest == 80  # the scales of the widest layer's output channels; its weights are 80 x 20


def test_the_config_lists_every_ternary_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    layers = ternary_layers(ternary_encoder())
    assert config["packed"]["layers"] == [
        {"name": name, "in_features": layer.in_features, "out_features": layer.out_features}
        for name, layer in layers.items()
    ]
    assert config["bitnet"] == {"scale": "channel", "norm": True}
    assert config["sentence"] == {"pooling": "mean"}
    assert (folder / "tokenizer.model").read_bytes() == b"spm"


def test_packing_twice_gives_the_same_bytes_and_leaves_the_encoder_alone(folder, tmp_path):
    encoder = ternary_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    pack(encoder, tmp_path / "again", tokenizer=b"spm", sentence={"pooling": "mean"})
    assert digests(tmp_path / "again") == digests(folder)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_an_encoder_that_is_not_ternary_or_not_at_full_strength_is_refused(tmp_path):
    with pytest.raises(FrankensteinError, match="no BitLinear layers"):
        pack(Encoder(OPTIONS), tmp_path / "packed")
    encoder = ternary_encoder()
    set_strength(encoder, 1.0, 0.5)
    with pytest.raises(FrankensteinError, match=r"blocks\.0\..* is quantized at strength 1\.0, 0\.5"):
        pack(encoder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_encoder_with_nan_is_refused(tmp_path):
    encoder = ternary_encoder()
    torch.nn.init.constant_(encoder.final_norm.weight, torch.nan)
    with pytest.raises(FrankensteinError, match="not finite"):
        pack(encoder, tmp_path / "packed")


def test_unknown_settings_are_named(folder, tmp_path):
    known = "auto, int_mm, onednn, reference"
    with pytest.raises(FrankensteinError, match=f"unknown ternary backend 'gpu'; known: {known}"):
        load_packed(folder, "gpu")
    with pytest.raises(FrankensteinError, match="embeddings 'int4'; allowed: int8, float32"):
        to_packed(ternary_encoder(), embeddings="int4")


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: \d+ bytes, the manifest says"):
        load_packed(folder)


def test_an_invalid_code_is_refused_with_its_layer(folder):
    name = "blocks.1.ffn.up.qweight"
    damaged = load_file(folder / "model.safetensors")[name]
    damaged[4, 0] |= 0b11
    rewrite(folder, {name: damaged})
    with pytest.raises(ArtifactError, match=r"blocks\.1\.ffn\.up\.qweight: row 4 holds the code 0b11"):
        load_packed(folder)


def test_missing_unexpected_and_misshapen_tensors_are_refused(folder):
    original = load_file(folder / "model.safetensors")
    for change, message in (
        ({"blocks.0.ffn.up.scale": None}, r"Missing key\(s\).*blocks\.0\.ffn\.up\.scale"),
        ({"extra": torch.zeros(1)}, r"Unexpected key\(s\).*extra"),
        ({"blocks.0.ffn.up.scale": torch.ones(3)}, "size mismatch for blocks.0.ffn.up.scale"),
        ({"blocks.0.ffn.up.qweight": torch.ones(30, 5)}, "wrong number type of blocks.0.ffn.up.qweight"),
        ({"probe.output": None}, r"lacks probe\.input_ids or probe\.output"),
    ):
        rewrite(folder, change)
        with pytest.raises(ArtifactError, match=message) as caught:
            load_packed(folder)
        assert "\n" not in str(caught.value)
        rewrite(folder, {**dict.fromkeys(change), **original})


def test_exchanged_weights_fail_the_probe(folder):
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {"blocks.0.ffn.up.qweight": tensors["blocks.0.ffn.up.qweight"].flip(0)})
    with pytest.raises(ArtifactError, match="the stored probe comes out different"):
        load_packed(folder)


def test_artifacts_of_the_wrong_kind_are_refused(folder, tmp_path):
    encoder = Encoder(OPTIONS, max_length=24)
    save_encoder(encoder, tmp_path / "full", tokenizer=b"spm", max_length=24)
    with pytest.raises(ArtifactError, match="is an encoder artifact; expected packed_encoder"):
        load_packed(tmp_path / "full")
    with pytest.raises(ArtifactError, match="is a full-precision encoder"):
        load_latent(tmp_path / "full")
    with pytest.raises(ArtifactError, match="packed_encoder"):
        load_latent(folder)


@pytest.mark.parametrize("norm", [True, False])
def test_latent_weights_come_back_as_they_were_saved(norm, tmp_path):
    encoder = ternary_encoder("tensor", norm)
    save_encoder(encoder, tmp_path / "latent", tokenizer=b"spm", max_length=24, bitnet=bitnet_config(encoder))
    again = load_latent(tmp_path / "latent")
    assert bitnet_config(again) == {"scale": "tensor", "norm": norm}
    ids, mask = batch()
    assert torch.equal(again(ids, mask), encoder(ids, mask))


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    load_packed(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_size_report_counts_what_is_stored(folder):
    encoder, packed = ternary_encoder(), load_packed(folder)
    report = size_report(encoder, packed)
    layers = [m for m in packed.modules() if isinstance(m, PackedTernaryLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert report["ternary_layers"]["weights"] == weights
    assert report["ternary_layers"]["two_bit"] == sum(layer.qweight.numel() for layer in layers)
    assert report["ternary_layers"]["packed"] == report["ternary_layers"]["two_bit"] + 4 * sum(
        layer.out_features for layer in layers
    )
    assert report["model"]["float32"] == 4 * sum(p.numel() for p in encoder.parameters())
    stored = load_file(folder / "model.safetensors")
    payload = sum(t.numel() * t.element_size() for n, t in stored.items() if not n.startswith("probe."))
    assert report["model"]["packed"] == payload
    zeros = sum(int((layer.codes == 0).sum()) for layer in layers)
    assert zero_share(packed) == zeros / weights
