"""Forgetting attention. The numbers in *forgetting_attn.safetensors come from fla-org/flash-linear-attention@bc3b101
naive_forgetting_attn (one head of 64 tokens, window 8) and from torch 2.13 scaled_dot_product_attention with the bias D
(both directions, two padded rows); gradients are those of sum(w_o * o), in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import decay_softmax, fox
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.fox import (
    ForgettingAttention,
    bidirectional_forgetting_attn,
    bidirectional_forgetting_attn_dense,
    forgetting_attn,
    forgetting_attn_dense,
)
from frankenstein.model.positions import Rotary

F64, ROPE = torch.float64, Rotary()
TOLERANCE = {torch.float32: (1e-4, 1e-4), F64: (1e-9, 1e-9)}


@pytest.fixture(params=[(9, 500), (16, 1 << 18), (128, 1 << 18)], ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every row is tiled, in tiles of several sizes."""
    rows, logits = request.param
    monkeypatch.setattr(fox, "SHORT", 0)
    monkeypatch.setattr(decay_softmax, "ROWS", rows)
    monkeypatch.setattr(decay_softmax, "LOGITS", logits)
    yield


def random_inputs(length: int, strength: float = 0.3, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(2, length, 3, 4), (2, length, 3, 4), (2, length, 3, 5)]
    inputs = [torch.randn(*s, generator=g, dtype=F64) for s in shapes]
    inputs += [-strength * torch.rand(2, length, 3, generator=g, dtype=F64) for _ in range(2)]
    return [x.to(dtype).requires_grad_() for x in inputs]


def outcome(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], **named: object) -> tuple:
    o = function(*inputs[:4], **named)
    used = inputs if "g_rev" in named else inputs[:4]
    return (o, *torch.autograd.grad(o.sin().sum(), used))


def assert_same(fast: tuple, plain: tuple, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    for f, p in zip(fast, plain, strict=True):
        torch.testing.assert_close(f, p, rtol=rtol, atol=atol)


def padded_mask(length: int) -> torch.Tensor:
    return torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("strength", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("length", [1, 7, 33, 130])
def test_tiles_equal_the_equation_with_gradients(length: int, strength: float) -> None:
    inputs = random_inputs(length, strength)
    for window in (None, 1, 5, 40):
        results = [outcome(f, inputs, window_size=window) for f in (forgetting_attn, forgetting_attn_dense)]
        assert_same(*results)
    both = (bidirectional_forgetting_attn, bidirectional_forgetting_attn_dense)
    for named in ({}, {"mask": padded_mask(length)}, {"mask": padded_mask(length), "g_rev": inputs[4]}):
        assert_same(*[outcome(f, inputs, **named) for f in both])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tiled", [False, True], ids=["short", "tiled"])
@pytest.mark.parametrize(
    ("name", "function", "named"),
    [
        ("forgetting_attn", forgetting_attn, {"window_size": 8}),
        ("bidirectional_forgetting_attn", bidirectional_forgetting_attn, {}),
    ],
)
def test_values_and_gradients_equal_published_code(
    name: str,
    function: Callable[..., torch.Tensor],
    named: dict,
    tiled: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tiled:
        monkeypatch.setattr(fox, "SHORT", 0)
        monkeypatch.setattr(decay_softmax, "ROWS", 16)
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    inputs = {k: case[k].to(dtype).requires_grad_() for k in "qkvg"}
    if "mask" in case:
        named = {**named, "mask": case["mask"]}
    o = function(**inputs, **named)
    assert o.dtype == dtype
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(o.double(), case["expected_o"], rtol=rtol, atol=atol)
    (o * case["w_o"].to(dtype)).sum().backward()
    for k, x in inputs.items():
        torch.testing.assert_close(x.grad.double(), case[f"expected_grad_{k}"], rtol=rtol, atol=atol)


def test_the_bias_counts_gates_from_the_query_inclusive_to_the_key_exclusive() -> None:
    _, _, v, g, g_rev = random_inputs(6)
    q = k = torch.zeros(2, 6, 3, 4, dtype=F64)
    weights = torch.zeros(2, 3, 6, 6, dtype=F64)
    for i in range(6):
        for j in range(6):
            between = g[:, j + 1 : i + 1] if j <= i else g_rev[:, i:j]
            weights[:, :, i, j] = between.sum(1).exp()
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(bidirectional_forgetting_attn(q, k, v, g, g_rev=g_rev), expected)
    past = weights.tril()
    expected = torch.einsum("bhij,bjhv->bihv", past / past.sum(-1, keepdim=True), v)
    torch.testing.assert_close(forgetting_attn(q, k, v, g), expected)


@pytest.mark.usefixtures("tiles")
def test_without_forgetting_it_is_softmax_attention() -> None:
    q, k, v, g, _ = random_inputs(35, 0.0)
    q2, k2, v2 = (x.transpose(1, 2) for x in (q, k, v))
    both = F.scaled_dot_product_attention(q2, k2, v2).transpose(1, 2)
    torch.testing.assert_close(bidirectional_forgetting_attn(q, k, v, g), both)
    causal = F.scaled_dot_product_attention(q2, k2, v2, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(forgetting_attn(q, k, v, g), causal)


@pytest.mark.usefixtures("tiles")
def test_with_total_forgetting_every_token_keeps_its_own_value() -> None:
    q, k, v, *_ = random_inputs(35)
    g = torch.full((2, 35, 3), -900.0, dtype=F64)
    torch.testing.assert_close(bidirectional_forgetting_attn(q, k, v, g), v)
    torch.testing.assert_close(forgetting_attn(q, k, v, g), v)


@pytest.mark.usefixtures("tiles")
def test_reversing_the_input_reverses_the_output() -> None:
    inputs = [x.detach() for x in random_inputs(37)]
    flipped = [x.flip(1) for x in inputs]
    o = bidirectional_forgetting_attn(*inputs[:4], g_rev=inputs[4])
    back = bidirectional_forgetting_attn(*flipped[:3], flipped[4], g_rev=flipped[3])
    torch.testing.assert_close(back.flip(1), o)


@pytest.mark.usefixtures("tiles")
def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient() -> None:
    inputs = random_inputs(22)
    mask = torch.arange(22)[None] < torch.tensor([[22], [9]])
    o = bidirectional_forgetting_attn(*inputs[:4], mask=mask, g_rev=inputs[4])
    alone = [x[1:, :9] for x in inputs]
    torch.testing.assert_close(o[1:, :9], bidirectional_forgetting_attn(*alone[:4], g_rev=alone[4]))
    assert o[1, 9:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), inputs):
        assert grad[1, 9:].abs().max() == 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype) -> None:
    inputs = random_inputs(300, 0.0, dtype)
    inputs[3] = torch.full((2, 300, 3), -3.0, dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for fast, plain in (
        (forgetting_attn, forgetting_attn_dense),
        (bidirectional_forgetting_attn, bidirectional_forgetting_attn_dense),
    ):
        got = outcome(fast, inputs)
        assert all(x.dtype == dtype for x in got)
        assert_same([x.double() for x in got], outcome(plain, exact), *TOLERANCE[dtype])


def test_strong_decay_leaves_far_keys_out_of_the_work() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2048, 16)
    c = torch.full((1, 2048), -0.7, dtype=F64).cumsum(1)
    queries, keys, _ = decay_softmax._operands(x, x, x, 0.25)
    tiles = list(decay_softmax._tiles(queries, keys, decay_softmax.Decay(c, c + 0.7, None, None)))
    pairs = sum((t.b - t.a) * (t.t - t.s) for t in tiles)
    assert [t.a for t in tiles] == list(range(0, 2048, 128))
    assert pairs < 2048 * 2048 / 5
    constant = decay_softmax.Decay(torch.zeros_like(c), torch.zeros_like(c), None, None)
    assert all((t.s, t.t) == (0, 2048) for t in decay_softmax._tiles(queries, keys, constant))


def build(
    *, causal: bool = False, kv_heads: int | None = None, rope: Rotary | None = ROPE, **options: bool | int
) -> tuple:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, causal, 16, 0, rope, num_kv_heads=kv_heads)
    layer = ForgettingAttention(context, ForgettingAttention.Options(**options)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, torch.randn(2, 7, 8, dtype=F64)


def test_the_layer_follows_the_equation() -> None:
    layer, x = build(reverse_gate=True)
    q, k, v = layer.project.linear(x).view(2, 7, 3, 2, 4).unbind(2)
    g, g_rev = ((x @ gate.weight.T + gate.bias).sigmoid().log() for gate in (layer.gate, layer.gate_reverse))
    o = torch.zeros(2, 7, 2, 4, dtype=F64)
    for i in range(7):
        decay = torch.stack([(g[:, j + 1 : i + 1] if j <= i else g_rev[:, i:j]).sum(1) for j in range(7)], -1)
        weights = (torch.einsum("bhk,bjhk->bhj", q[:, i], k) / 2 + decay).softmax(-1)
        o[:, i] = torch.einsum("bhj,bjhv->bhv", weights, v)
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


def test_the_pro_block_shifts_norms_and_gates_as_its_authors_do() -> None:
    switches = {"qk_norm": True, "kv_shift": True, "output_norm": True, "output_gate": True}
    layer, x = build(causal=True, **switches)
    q, k, v, gate = layer.project.linear(x).view(2, 7, 4, 2, 4).unbind(2)
    k, v = k.clone(), v.clone()
    for part, shift in ((k, layer.shift_k), (v, layer.shift_v)):
        a = (x @ shift.weight.T).sigmoid()[..., None]
        before = torch.cat([torch.zeros_like(part[:, :1]), part[:, :-1]], 1)
        part.copy_(a * before + (1 - a) * part)
    q, k = (
        y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for y, norm in ((q, layer.norm_q), (k, layer.norm_k))
    )
    g = (x @ layer.gate.weight.T + layer.gate.bias).sigmoid().log()
    o = forgetting_attn_dense(q, k, v, g)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_o.weight * gate.sigmoid()
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_every_option_keeps_padding_out_and_reaches_every_parameter(causal: bool) -> None:
    layer, x = build(
        causal=causal, kv_heads=1, reverse_gate=True, qk_norm=True, kv_shift=True, output_norm=True, output_gate=True
    )
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    y = layer(x, mask)
    torch.testing.assert_close(y[1:, :4], layer(x[1:, :4], None))
    y[mask].sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_positions_turn_queries_and_keys_only_when_asked() -> None:
    (still, x), (turned, _) = build(), build(rotary=True)
    q, k, v = turned.project.linear(x).view(2, 7, 3, 2, 4).unbind(2)
    g = (x @ turned.gate.weight.T + turned.gate.bias).sigmoid().log()
    expected = bidirectional_forgetting_attn_dense(Rotary()(q), Rotary()(k), v, g)
    torch.testing.assert_close(turned(x), turned.out(expected.flatten(2)))
    torch.testing.assert_close(still(x), still.out(bidirectional_forgetting_attn_dense(q, k, v, g).flatten(2)))
    with pytest.raises(FrankensteinError, match=r"fox_attn\.rotary=true needs model\.positions: rope"):
        build(rope=None, rotary=True)


def test_a_window_both_ways_is_refused() -> None:
    with pytest.raises(FrankensteinError, match=r"model\.mixers\.fox_attn\.window_size=4 needs model\.causal: true"):
        build(window_size=4)
    layer, x = build(causal=True, window_size=2)
    changed = x.clone()
    changed[:, 0] += 1.0
    torch.testing.assert_close(layer(x)[:, 2:], layer(changed)[:, 2:])
