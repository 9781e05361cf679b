"""The masks of longformer_mask.safetensors are where d out_i / d x_j of LongformerSelfAttention is not 0
(huggingface/transformers 5.23.0, float64, evaluation mode); the global token of the first is token 0.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.longformer import LongformerAttention, longformer_attention, longformer_dense, longformer_mask
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.model.positions import Rotary

F64 = torch.float64


def random_qkv(length: int, count: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(2, length, 2, 4, generator=g, dtype=F64, requires_grad=True) for _ in range(count)]


def layer_of(causal: bool = False, kv_heads: int | None = None, **options: int) -> LongformerAttention:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, causal, 16, 0, Rotary(), kv_heads)
    return LongformerAttention(context, LongformerAttention.Options(**options)).double()


@pytest.mark.parametrize(("name", "window_size", "tokens"), [("t32_w8_g1", 8, [0]), ("t32_w16_g0", 16, [])])
def test_masks_equal_published_code(name: str, window_size: int, tokens: list[int]) -> None:
    published = load_file(Path(__file__).parent / "longformer_mask.safetensors")
    assert torch.equal(longformer_mask(32, window_size=window_size, global_tokens=tokens), published[name])


def test_global_tokens_may_stand_anywhere() -> None:
    mask = longformer_mask(9, window_size=2, global_tokens=[4, 7])
    expected = [[abs(i - j) <= 1 or i in (4, 7) or j in (4, 7) for j in range(9)] for i in range(9)]
    assert mask.tolist() == expected
    with pytest.raises(FrankensteinError, match=r"global_tokens=\[9\]; expected positions 0 \.\. 8"):
        longformer_mask(9, window_size=2, global_tokens=[9])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("length", [1, 12, 201])
@pytest.mark.parametrize(("window_size", "num_global"), [(0, 0), (6, 1), (21, 3), (6, 250), (500, 2)])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_pieces_equal_the_masked_softmax_with_gradients(
    window_size: int, num_global: int, causal: bool, length: int, padded: bool, separate: bool
) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [(length + 1) // 2]]) if padded else None
    results = []
    for function in (longformer_attention, longformer_dense):
        q, k, v, *others = inputs = random_qkv(length, 6)
        of_global = (others[0][:, :num_global], *others[1:]) if separate else None
        settings = {"window_size": window_size, "num_global": num_global, "scale": 0.7}
        o = function(q, k, v, of_global=of_global, mask=mask, causal=causal, **settings)
        grads = torch.autograd.grad(o.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append((o, *grads))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_a_window_over_the_whole_row_is_softmax_attention() -> None:
    q, k, v = random_qkv(21)
    for causal in (False, True):
        o = longformer_attention(q, k, v, window_size=40, num_global=0, causal=causal)
        torch.testing.assert_close(o, softmax_attention(q, k, v, causal=causal))


def test_without_window_and_global_tokens_every_token_is_alone() -> None:
    q, k, v = random_qkv(150)
    torch.testing.assert_close(longformer_attention(q, k, v, window_size=0, num_global=0), v)


def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient() -> None:
    q, k, v = random_qkv(201)
    mask = torch.arange(201)[None] < torch.tensor([[201], [90]])
    settings = {"window_size": 6, "num_global": 2}
    o = longformer_attention(q, k, v, mask=mask, **settings)
    alone = longformer_attention(q[1:, :90], k[1:, :90], v[1:, :90], **settings)
    torch.testing.assert_close(o[1:, :90], alone)
    assert o[1, 90:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), (q, k, v)):
        assert grad[1, 90:].abs().max() == 0


def test_reversing_the_input_reverses_the_output_without_global_tokens() -> None:
    q, k, v = random_qkv(150)
    o = longformer_attention(q, k, v, window_size=8, num_global=0)
    flipped = longformer_attention(q.flip(1), k.flip(1), v.flip(1), window_size=8, num_global=0)
    torch.testing.assert_close(flipped.flip(1), o)


@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_authors_equations(causal: bool, kv_heads: int | None) -> None:
    layer, rotary, groups = layer_of(causal, kv_heads, window_size=4, num_global=2), Rotary(), kv_heads or 2
    torch.nn.init.normal_(layer.query_global.weight)
    torch.nn.init.normal_(layer.key_value_global.weight)
    x = torch.randn(1, 13, 8, dtype=F64)
    queries, keys, values = layer.project.linear(x).unflatten(-1, (-1, 4)).split((2, groups, groups), 2)
    queries, keys = rotary(queries), rotary(keys)
    queries_global = rotary(layer.query_global(x).unflatten(-1, (-1, 4)))
    keys_global, values_global = layer.key_value_global(x).unflatten(-1, (-1, 4)).split(groups, 2)
    keys_global = rotary(keys_global)
    o = torch.zeros(1, 13, 2, 4, dtype=F64)
    for i in range(13):
        seen = [j for j in range(13) if (abs(i - j) <= 2 or i < 2 or j < 2) and (j <= i or not causal)]
        q, k, v = (queries_global, keys_global, values_global) if i < 2 else (queries, keys, values)
        for h in range(2):
            g = h if groups == 2 else 0
            o[0, i, h] = torch.softmax(k[0, seen, g] @ q[0, i, h] / 2, 0) @ v[0, seen, g]
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


def test_global_projections_start_as_copies_and_learn_on_their_own() -> None:
    layer = layer_of(window_size=4)
    together = torch.cat([layer.query_global.weight, layer.key_value_global.weight])
    assert torch.equal(together, layer.project.linear.weight)
    x = torch.randn(2, 13, 8, dtype=F64)
    q, k, v = layer.project(x)
    shared = longformer_attention(q, k, v, window_size=4, num_global=1)
    torch.testing.assert_close(layer(x), layer.out(shared.flatten(2)))
    layer(x).sin().sum().backward()
    assert layer.query_global.weight.grad.abs().max() > 0
    assert not torch.equal(layer.query_global.weight.grad, layer.project.linear.weight.grad[:8])
    torch.nn.init.zeros_(layer.project.linear.weight)
    layer.initialize()
    assert layer.query_global.weight.abs().max() == 0 and layer.key_value_global.weight.abs().max() == 0


def test_without_global_tokens_the_layer_has_no_global_projections() -> None:
    layer = layer_of(window_size=4, num_global=0)
    assert {name for name, _ in layer.named_parameters()} == {"project.linear.weight", "out.weight"}
    layer.initialize()
    assert layer(torch.randn(2, 13, 8, dtype=F64)).shape == (2, 13, 8)


def test_autocast_stays_close() -> None:
    layer, x = layer_of(window_size=4).float(), torch.randn(2, 150, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.02)
