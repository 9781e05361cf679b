"""The masks of sparse_transformer_mask.safetensors were made with openai/sparse_attention@c53f3bd get_attn_mask
(strided; bidir: mask | mask^T) and deepspeedai/DeepSpeed@edaa722 FixedSparsityConfig with blocks of one token (fixed).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.sparse_transformer import (
    SparseTransformerAttention,
    sparse_transformer_attention,
    sparse_transformer_dense,
    sparse_transformer_mask,
)
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.model.positions import Rotary

F64 = torch.float64
PUBLISHED = load_file(Path(__file__).parent / "sparse_transformer_mask.safetensors")


def random_qkv(length: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(2, length, 2, 4, generator=g, dtype=F64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_equal_published_code(name: str) -> None:
    pattern, direction, length, stride, *rest = name.split("_")
    mask = sparse_transformer_mask(
        int(length[1:]),
        pattern=pattern,
        stride=int(stride[1:]),
        causal=direction in ("causal", "unidi"),
        summary_cols=int(rest[0][1:]) if rest else 1,
    )
    assert torch.equal(mask, PUBLISHED[name])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("length", [1, 7, 8, 33, 201])
@pytest.mark.parametrize(
    "pattern",
    [
        {"pattern": "strided", "stride": 8},
        {"pattern": "strided", "stride": 1},
        {"pattern": "fixed", "stride": 8, "summary_cols": 1},
        {"pattern": "fixed", "stride": 8, "summary_cols": 3},
        {"pattern": "fixed", "stride": 4, "summary_cols": 4},
    ],
    ids=lambda p: "_".join(map(str, p.values())),
)
def test_pieces_equal_the_masked_softmax_with_gradients(pattern: dict, causal: bool, length: int, padded: bool) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [(length + 1) // 2]]) if padded else None
    results = []
    for function in (sparse_transformer_attention, sparse_transformer_dense):
        inputs = random_qkv(length)
        o = function(*inputs, mask=mask, causal=causal, scale=0.7, **pattern)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_a_stride_of_the_whole_row_is_softmax_attention(pattern: str) -> None:
    q, k, v = random_qkv(20)
    o = sparse_transformer_attention(q, k, v, pattern=pattern, stride=20)
    torch.testing.assert_close(o, softmax_attention(q, k, v))


def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient() -> None:
    q, k, v = random_qkv(40)
    mask = torch.arange(40)[None] < torch.tensor([[40], [21]])
    for pattern in ("strided", "fixed"):
        o = sparse_transformer_attention(q, k, v, pattern=pattern, stride=6, mask=mask)
        alone = sparse_transformer_attention(q[1:, :21], k[1:, :21], v[1:, :21], pattern=pattern, stride=6)
        torch.testing.assert_close(o[1:, :21], alone)
        assert o[1, 21:].abs().max() == 0
        for grad in torch.autograd.grad(o.sin().sum(), (q, k, v)):
            assert grad[1, 21:].abs().max() == 0


def test_reversing_the_input_reverses_the_strided_output() -> None:
    q, k, v = random_qkv(29)
    o = sparse_transformer_attention(q, k, v, pattern="strided", stride=5)
    flipped = sparse_transformer_attention(q.flip(1), k.flip(1), v.flip(1), pattern="strided", stride=5)
    torch.testing.assert_close(flipped.flip(1), o)


@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_the_layer_follows_the_equation(pattern: str, kv_heads: int | None) -> None:
    torch.manual_seed(0)
    rotary = Rotary()
    context = MixerContext(8, 2, 2, 0.0, False, 16, 0, rotary, kv_heads)
    options = SparseTransformerAttention.Options(pattern=pattern, stride=4, summary_cols=2)
    layer = SparseTransformerAttention(context, options).double()
    x = torch.randn(1, 13, 8, dtype=F64)
    parts = layer.project.linear(x).unflatten(-1, (-1, 4))
    groups = kv_heads or 2
    q, k, v = rotary(parts[:, :, :2]), rotary(parts[:, :, 2 : 2 + groups]), parts[:, :, 2 + groups :]
    o = torch.zeros(1, 13, 2, 4, dtype=F64)
    for i in range(13):
        if pattern == "strided":
            seen = [j for j in range(13) if abs(i - j) < 4 or (i - j) % 4 == 0]
        else:
            seen = [j for j in range(13) if i // 4 == j // 4 or j % 4 in (2, 3)]
        for h in range(2):
            g = h if groups == 2 else 0
            o[0, i, h] = torch.softmax(k[0, seen, g] @ q[0, i, h] / 2, 0) @ v[0, seen, g]
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_padding_never_moves_the_pattern(pattern: str) -> None:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, False, 16, 0, None)
    options = SparseTransformerAttention.Options(pattern=pattern, stride=4, summary_cols=1)
    layer = SparseTransformerAttention(context, options).double()
    x = torch.randn(1, 30, 8, dtype=F64)
    for padding in (1, 11, 100):
        mask = torch.arange(30 + padding)[None] < 30
        padded = layer(torch.cat([x, torch.full((1, padding, 8), 9.0, dtype=F64)], 1), mask)
        torch.testing.assert_close(padded[:, :30], layer(x))


def test_autocast_stays_close() -> None:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, False, 16, 0, None)
    layer = SparseTransformerAttention(context, SparseTransformerAttention.Options(stride=4, summary_cols=1))
    x = torch.randn(2, 30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.02)


def test_wrong_patterns_are_named() -> None:
    with pytest.raises(FrankensteinError, match="unknown sparse pattern 'random'; known: strided, fixed"):
        sparse_transformer_mask(8, pattern="random", stride=2, causal=False)
    with pytest.raises(FrankensteinError, match=r"summary_cols=3; expected 1 \.\. stride=2"):
        sparse_transformer_mask(8, pattern="fixed", stride=2, causal=False, summary_cols=3)
    with pytest.raises(FrankensteinError, match="stride=0; expected at least 1"):
        sparse_transformer_mask(8, pattern="fixed", stride=0, causal=False)
    context = MixerContext(8, 2, 2, 0.0, False, 16, 0, None)
    with pytest.raises(FrankensteinError, match=r"model\.mixers\.sparse_transformer_attn\.summary_cols=8 is more than"):
        SparseTransformerAttention(context, SparseTransformerAttention.Options(stride=4))
