"""The ternary table: by hand, straight-through, in training and packed, and refused where it was not trained so."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from frankenstein.artifact import MANIFEST, ArtifactError, digests, read_json, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.optimizers.groups import parameter_groups
from frankenstein.quantization.artifact import load_packed, pack
from frankenstein.quantization.bitlinear import set_strength
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear
from frankenstein.quantization.embedding import PackedTernaryEmbedding, TernaryEmbedding, round_embeddings


def table(vocab_size: int = 300, width: int = 50) -> TernaryEmbedding:
    torch.manual_seed(0)
    return TernaryEmbedding.from_embedding(nn.Embedding(vocab_size, width))


def encoder() -> Encoder:
    torch.manual_seed(0)
    options = ModelOptions(vocab_size=50, hidden_size=20, num_layers=1, num_heads=2, retention_heads=2)
    return Encoder(options, max_length=24)


def test_a_row_by_hand() -> None:
    rows = TernaryEmbedding(nn.Parameter(torch.tensor([[1.0, -0.2, 0.4, -2.0], [0.0, 0.0, 0.0, 0.0]])))
    # mean |row| = 0.9: thresholds at 0.45
    torch.testing.assert_close(rows.weight, torch.tensor([[0.9, 0.0, 0.0, -0.9], [0.0, 0.0, 0.0, 0.0]]))


def test_gradients_pass_straight_through_to_the_rows_that_were_looked_up() -> None:
    embedding, ids = table(), torch.tensor([[3, 7], [7, 1]])
    weights = torch.randn(2, 2, 50)
    (embedding(ids) * weights).sum().backward()
    expected = torch.zeros(300, 50).index_add(0, ids.flatten(), weights.flatten(0, 1))
    torch.testing.assert_close(embedding.latent.grad, expected)


@pytest.mark.parametrize("width", [1, 7, 64, 1024])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 9), (2, 300)])
def test_packed_lookups_equal_the_trained_ones_bit_for_bit(shape: tuple[int, ...], width: int) -> None:
    embedding = table(width=width)
    packed = PackedTernaryEmbedding.from_ternary(embedding)
    ids = torch.randint(0, 300, shape)
    assert torch.equal(packed(ids), embedding(ids)) and packed(ids).dtype == torch.float32
    assert torch.equal(packed.weight, embedding.weight)
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_the_packed_table_takes_two_bits_a_weight_and_a_scale_a_row() -> None:
    packed = PackedTernaryEmbedding.from_ternary(table())
    assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.state_dict().items()} == {
        "qweight": (torch.uint8, (300, 13)),
        "scale": (torch.float32, (300,)),
    }


def test_strength_phases_it_in() -> None:
    embedding, ids = table(), torch.arange(300)
    full = embedding(ids).detach()
    set_strength(embedding, 0.0, 0.0)
    assert torch.equal(embedding(ids), embedding.latent)
    set_strength(embedding, 0.25, 0.0)
    torch.testing.assert_close(embedding(ids), embedding.latent + 0.25 * (full - embedding.latent))
    embedding(ids).sum().backward()
    assert torch.equal(embedding.latent.grad, torch.ones(300, 50))


def test_converting_keeps_the_parameter_its_group_and_the_settings() -> None:
    model = encoder()
    before = model.embedding.weight
    convert_to_bitlinear(model, embeddings=True)
    assert model.embedding.latent is before
    assert any(p is before for p in parameter_groups(model)["embeddings"])
    assert bitnet_config(model) == {"scale": "channel", "norm": True, "embeddings": True}
    assert convert_to_bitlinear(model, embeddings=True) is model
    with pytest.raises(FrankensteinError, match="ternary already"):
        convert_to_bitlinear(model)
    assert bitnet_config(convert_to_bitlinear(encoder())) == {"scale": "channel", "norm": True}


def test_rounding_to_int8_leaves_a_ternary_table_alone() -> None:
    embedding = table()
    before = embedding.latent.detach().clone()
    round_embeddings(embedding)
    assert torch.equal(embedding.latent, before)


def test_a_ternary_table_is_always_stored_ternary_and_a_float_one_never(tmp_path: Path) -> None:
    model = convert_to_bitlinear(encoder(), embeddings=True)
    for storage in ("int8", "float32", "ternary"):
        pack(model, tmp_path / storage, embeddings=storage)
        assert isinstance(load_packed(tmp_path / storage).embedding, PackedTernaryEmbedding)
    with pytest.raises(FrankensteinError, match="table was trained in full precision; set"):
        pack(convert_to_bitlinear(encoder()), tmp_path / "float", embeddings="ternary")


def test_an_invalid_code_in_the_table_is_refused(tmp_path: Path) -> None:
    pack(convert_to_bitlinear(encoder(), embeddings=True), tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["embedding.qweight"][4, 0] |= 0b11
    save_file(tensors, file)
    folder = tmp_path / "packed"
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "files": digests(folder)})
    with pytest.raises(ArtifactError, match=r"embedding\.qweight: row 4 holds the code 0b11"):
        load_packed(folder)
