"""Grouped-query attention: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245."""

import pytest
import torch

from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "ffn_hidden_size": 24}
PARTS = {"standard_attn": 3, "sigmoid_attn": 3, "gated_softmax_attn": 4}


def encoder(name: str, groups: int | None) -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelOptions(**SMALL, layer_pattern=(name,), num_kv_heads=groups), max_length=32).eval()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", PARTS)
def test_it_equals_full_attention_whose_keys_and_values_repeat(name: str, groups: int) -> None:
    grouped, full = encoder(name, groups), encoder(name, None)
    state = grouped.state_dict()
    key = "blocks.0.mixer.project.linear.weight"
    parts = state[key].mul_(20).view(-1, 4, 16).split([4, groups, groups, 4 * (PARTS[name] - 3)])
    repeated = [part.repeat_interleave(4 // groups, 0) if i in (1, 2) else part for i, part in enumerate(parts)]
    full.load_state_dict({**state, key: torch.cat(repeated).flatten(0, 1)})
    ids = torch.arange(5, 23).view(2, 9)
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    torch.testing.assert_close(grouped(ids, mask), full(ids, mask))


@pytest.mark.parametrize("name", PARTS)
def test_fewer_key_and_value_heads_take_fewer_parameters(name: str) -> None:
    counts = [encoder(name, groups).parameter_count()["mixers"] for groups in (None, 4, 2, 1)]
    full = (PARTS[name] + 1) * 16 * 16
    assert counts == [full, full, full - 2 * 16 * 8, full - 2 * 16 * 12]
