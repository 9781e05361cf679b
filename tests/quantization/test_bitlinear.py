"""The arithmetic of ternary layers: worked by hand, against plain formulas, and against frozen reference numbers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.bitlinear import (
    BitLinear,
    activation_quantize,
    bitlinear,
    set_strength,
    ternary_linear,
    ternary_pack,
    ternary_quantize,
)

REFERENCE = Path(__file__).parent / "bitlinear_reference.safetensors"  # how it was made stands in its metadata


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_hand_worked_4_by_4_example():
    weight = torch.tensor([[1.0, -0.2, 0.0, 2.0], [-1.0, 0.9, 0.1, 0.0], [0.4, 0.6, -0.6, -3.0], [0.5, -0.5, 0.0, 5.2]])
    # sum |W| = 3.2 + 2.0 + 4.6 + 6.2 = 16.0, so the scale is 1 and 0.5 rounds to the even 0
    codes, scale = ternary_quantize(weight)
    assert scale.item() == pytest.approx(1.0, abs=1e-6)
    assert codes.tolist() == [[1, 0, 0, 1], [-1, 1, 0, 0], [0, 1, -1, -1], [0, 0, 0, 1]]
    x = torch.tensor([1.27, -0.5, 0.3, 0.0])  # scale 0.01: codes 127, -50, 30, 0
    x_codes, x_scale = activation_quantize(x)
    assert x_codes.tolist() == [127, -50, 30, 0]
    assert x_scale.item() == pytest.approx(0.01, rel=1e-6)
    y = ternary_linear(x[None], weight)[0]
    assert y.tolist() == pytest.approx([1.27, -1.77, -0.8, 0.0], abs=1e-5)


def test_rounding_is_half_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert activation_quantize(x)[0].tolist() == [127, 0, 2, 2, 0, -2]


def test_the_activation_scale_is_a_true_division_and_no_product_with_a_reciprocal():
    x = seeded(20000, 4, seed=3)
    codes, scale = activation_quantize(x)
    largest = x.numpy().__abs__().max(1, keepdims=True)
    expected_scale = largest / torch.tensor(127.0).numpy()
    assert torch.equal(scale, torch.from_numpy(expected_scale))
    assert torch.equal(codes.float(), torch.from_numpy((x.numpy() / expected_scale).round()))


def test_a_scale_per_channel_is_the_scale_of_each_row_alone():
    weight = seeded(6, 10) * torch.arange(1, 7)[:, None]
    codes, scale = ternary_quantize(weight, per_channel=True)
    for row in range(6):
        row_codes, row_scale = ternary_quantize(weight[row : row + 1])
        assert torch.equal(codes[row : row + 1], row_codes)
        torch.testing.assert_close(scale[row, 0], row_scale, rtol=1e-6, atol=0.0)  # another order of summation


@pytest.mark.parametrize("per_channel", [False, True])
def test_all_zero_weights_and_inputs_give_zero(per_channel):
    assert torch.equal(ternary_linear(torch.zeros(2, 4), torch.zeros(3, 4), per_channel=per_channel), torch.zeros(2, 3))


@pytest.mark.parametrize("per_channel", [False, True])
def test_straight_through_gradients_are_those_of_a_linear_layer_on_the_rounded_values(per_channel):
    x, weight, bias, upstream = seeded(2, 5, 12), seeded(7, 12, seed=1), seeded(7, seed=2), seeded(2, 5, 7, seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    got = ternary_linear(*leaves, per_channel=per_channel)
    (got * upstream).sum().backward()
    x_codes, x_scale = activation_quantize(x)
    w_codes, w_scale = ternary_quantize(weight, per_channel=per_channel)
    rounded = [t.clone().requires_grad_() for t in (x_codes * x_scale, w_codes * w_scale, bias)]
    expected = F.linear(*rounded)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(got, expected)
    for leaf, plain in zip(leaves, rounded, strict=True):
        torch.testing.assert_close(leaf.grad, plain.grad)


def test_training_on_straight_through_gradients_lowers_the_loss():
    torch.manual_seed(0)
    layer, target = BitLinear(16, 8), seeded(8, 16, seed=5)
    x = seeded(64, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("case", ["b2_t7", "t64_bias"])
def test_bitlinear_equals_the_reference_numbers(case):
    data = {k.removeprefix(f"{case}."): v for k, v in load_file(REFERENCE).items() if k.startswith(case)}
    inputs = {k: data[k].clone().requires_grad_() for k in ("x", "weight", "norm_weight", "bias") if k in data}
    y = bitlinear(**inputs, eps=1e-6)
    torch.testing.assert_close(y, data["expected_y"], rtol=1e-4, atol=1e-4)
    (y * data["w_y"]).sum().backward()
    for name, value in inputs.items():
        torch.testing.assert_close(value.grad, data[f"expected_grad_{name}"], rtol=1e-4, atol=1e-4)
    codes, scale = ternary_quantize(data["weight"])
    assert torch.equal(codes, data["expected_ternary"].to(torch.int8))
    torch.testing.assert_close(scale.reshape(1), data["expected_weight_scale"], rtol=1e-6, atol=0.0)


def test_ternary_pack_equals_the_reference_bytes():
    data = load_file(REFERENCE)
    assert torch.equal(ternary_pack(data["o8_i12.ternary"]), data["o8_i12.expected_packed"])


def test_ternary_pack_leaves_absent_rows_at_zero_bits():
    packed = ternary_pack(torch.tensor([[1], [0], [-1], [1], [1]], dtype=torch.int8))
    # rows 0 and 2, 4 share byte 0; rows 1 and 3 share byte 1
    assert packed.tolist() == [[2 | 0 << 2 | 2 << 4], [1 | 2 << 2]]


@pytest.mark.parametrize("norm", [False, True])
def test_strength_0_is_the_float_layer_exactly(norm):
    linear, x = nn.Linear(12, 7), seeded(3, 12)
    layer = BitLinear.from_linear(linear, norm=norm)
    set_strength(layer, 0.0, 0.0)
    h = F.rms_norm(x, (12,), torch.ones(12), 1e-6) if norm else x
    assert torch.equal(layer(x), linear(h))


@pytest.mark.parametrize("scale", ["tensor", "channel"])
def test_strength_1_is_the_quantized_layer_and_halfway_lies_between(scale):
    layer, x = BitLinear(12, 7, scale=scale, norm=False), seeded(3, 12)
    full = layer(x)
    assert torch.equal(full, ternary_linear(x, layer.weight, layer.bias, per_channel=scale == "channel"))
    set_strength(layer, 0.5, 0.0)
    codes, s = ternary_quantize(layer.weight, per_channel=scale == "channel")
    expected = F.linear(x, (layer.weight + codes * s) / 2, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    set_strength(layer, 1.0, 1.0 - 1e-7)
    torch.testing.assert_close(layer(x), full)


def test_gradients_pass_at_every_strength():
    for strength in (0.0, 0.3, 1.0):
        layer, x = BitLinear(12, 7), seeded(3, 12).requires_grad_()
        set_strength(layer, strength, strength)
        layer(x).square().sum().backward()
        for value in (x, *layer.parameters()):
            assert value.grad is not None
            assert bool(value.grad.isfinite().all()) and bool(value.grad.any())


def test_autocast_keeps_values_close_and_gradients_in_float32():
    layer, x = BitLinear(64, 32), seeded(8, 64)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x.requires_grad_())
        got.sum().backward()
    assert got.dtype == torch.bfloat16, "as a full-precision linear layer"
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_wrong_strengths_and_scales_are_named():
    with pytest.raises(FrankensteinError, match=r"strengths 1\.5"):
        set_strength(BitLinear(4, 4), 1.5, 0.0)
    with pytest.raises(FrankensteinError, match="'row'; allowed: channel, tensor"):
        BitLinear(4, 4, scale="row")
