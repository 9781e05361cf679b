"""Swapping the linear layers of a finished model."""

import pytest
import torch
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.bitlinear import BitLinear, set_strength
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear, ternary_layers


class TinyEncoder(nn.Module):
    """A stand-in with the encoder's parts: embedding, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False)) for _ in range(2)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_every_linear_of_the_blocks_is_swapped_and_nothing_else():
    model = convert_to_bitlinear(TinyEncoder())
    assert list(ternary_layers(model)) == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    assert type(model.head) is nn.Linear and type(model.embedding) is nn.Embedding
    assert bitnet_config(model) == {"scale": "channel", "norm": True}


def test_parameters_keep_their_identity_shape_and_values():
    model = TinyEncoder()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    convert_to_bitlinear(model)
    after = dict(model.named_parameters())
    for name, value in values.items():
        assert after[name] is before[name] and torch.equal(after[name], value)
    assert sorted(set(after) - set(before)) == [f"blocks.{b}.{i}.norm.weight" for b in (0, 1) for i in (0, 2)]


def test_at_strength_0_without_norm_the_function_does_not_change():
    model, ids = TinyEncoder(), torch.arange(10)
    expected = model(ids)
    convert_to_bitlinear(model, norm=False)
    set_strength(model, 0.0, 0.0)
    assert torch.equal(model(ids), expected)


def test_converting_draws_no_random_numbers():
    torch.manual_seed(1)
    model = TinyEncoder()
    state = torch.get_rng_state()
    convert_to_bitlinear(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_conversion_changes_nothing_and_other_settings_are_refused():
    model = convert_to_bitlinear(TinyEncoder(), scale="tensor")
    layers = ternary_layers(model)
    assert ternary_layers(convert_to_bitlinear(model, scale="tensor")) == layers
    with pytest.raises(FrankensteinError, match="ternary already"):
        convert_to_bitlinear(model, scale="channel")


def test_a_shared_linear_stays_shared():
    model = TinyEncoder()
    model.blocks[1][0] = model.blocks[0][0]
    convert_to_bitlinear(model)
    assert model.blocks[1][0] is model.blocks[0][0] and isinstance(model.blocks[0][0], BitLinear)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(FrankensteinError, match=r"LayerNorm has no nn\.Linear"):
        convert_to_bitlinear(nn.LayerNorm(4))
