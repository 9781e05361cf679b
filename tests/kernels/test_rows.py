"""The C kernels on rows: the norm against float64, the codes against the forms in torch operations, bit for bit."""

import pytest
import torch
from torch import Tensor

from frankenstein.kernels import native, rows
from frankenstein.kernels.rms_norm import rms_norm
from frankenstein.model.norms import dyt
from frankenstein.quantization.bitlinear import BitLinear, activation_codes, normed_codes, rescale, ternary_codes

pytestmark = pytest.mark.skipif(not native.available(rows.NAME), reason="needs a C compiler")
SHAPES = [(300, 64), (65, 7), (1000, 130), (1, 1), (2, 3, 16), (0, 8)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
    y = rms_norm(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_and_its_gradients_equal_float64(shape: tuple[int, ...]) -> None:
    inputs = draw(*shape), draw(shape[-1], seed=1), draw(*shape, seed=2)
    for got, expected in zip(run(*inputs, torch.float32), run(*inputs, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_products_have_the_bits_of_the_torch_form(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, per_row = 3 * draw(*shape), draw(*shape[:-1], 1, seed=1)
    scales = draw(shape[-1], seed=2), draw(1, seed=3)
    found = [*activation_codes(x), *(rescale(x.clone(), per_row, s, None) for s in scales)]
    fused = normed_codes(x, scales[0], 1e-6)
    in_turn = activation_codes(rms_norm(x, scales[0]))
    assert all(map(torch.equal, fused, in_turn)), "norm and codes at once are norm, then codes"
    monkeypatch.setattr(rows, "usable", lambda *_, half=False: False)
    expected = [*activation_codes(x), *(rescale(x.clone(), per_row, s, None) for s in scales)]
    assert all(map(torch.equal, found, expected))


def test_halves_are_rounded_to_even_and_small_rows_have_the_smallest_scale() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.4999998, 0.0]])
    assert activation_codes(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -126, 3, 0]]
    codes, scale = activation_codes(torch.zeros(2, 3))
    assert codes.tolist() == [[0, 0, 0]] * 2 and scale.flatten().tolist() == pytest.approx([1e-5 / 127] * 2)


@pytest.mark.parametrize("place", [0, 9, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_shows_in_its_row_and_in_no_other(bad: float, place: int) -> None:
    x = draw(3, 17)
    x[1, place] = bad
    for result in (rms_norm(x, torch.ones(17)), activation_codes(x)[0], normed_codes(x, torch.ones(17), 1e-6)[0]):
        assert torch.isnan(result[1]).any() and torch.isfinite(result[[0, 2]]).all()


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    x, weight, grad, threads = draw(1000, 130), draw(130, seed=1), draw(1000, 130, seed=2), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append([*run(x, weight, grad, torch.float32), *normed_codes(x, weight, 1e-6)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_ternary_layer_has_the_gradients_of_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, grad = BitLinear(24, 10), draw(5, 7, 24), draw(5, 7, 10, seed=1)
    assert layer.norm is not None
    with torch.no_grad():
        layer.norm.weight.copy_(draw(24, seed=2))
    found = []
    for usable in (rows.usable, lambda *_, half=False: False):
        monkeypatch.setattr(rows, "usable", usable)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        found.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_ternary_codes_are_those_of_the_torch_form(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(*shape)
    for dtype in (torch.float32, torch.bfloat16):
        with monkeypatch.context() as patch:
            codes, scale = ternary_codes(weight, True, dtype)
            patch.setattr(rows, "usable", lambda *_, half=False: False)
            expected, expected_scale = ternary_codes(weight, True, dtype)
        assert codes.dtype == expected.dtype == dtype and torch.equal(codes, expected)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_rows_are_computed_in_float32_and_rounded_once(shape: tuple[int, ...]) -> None:
    half = torch.bfloat16
    x, grad, per_row = draw(*shape).to(half), draw(*shape, seed=2).to(half), draw(*shape[:-1], 1, seed=3)
    weight = draw(shape[-1], seed=1)
    codes, scale, inverse = rows.quantize(x, weight, 1e-6, half)
    wide_codes, wide_scale, wide_inverse = rows.quantize(x.float(), weight, 1e-6)
    assert codes.dtype == half and torch.equal(codes.float(), wide_codes)
    assert inverse is not None and wide_inverse is not None
    assert torch.equal(scale, wide_scale) and torch.equal(inverse, wide_inverse)
    dx, dw = rows.norm_gradients(grad, x, weight, inverse)
    wide_dx, wide_dw = rows.norm_gradients(grad.float(), x.float(), weight, inverse)
    assert torch.equal(dx, wide_dx.to(half)) and torch.equal(dw, wide_dw)
    assert torch.equal(rows.dequantize(codes, per_row), (wide_codes * per_row).to(half))
    expected = rows.rescale(wide_codes.clone(), per_row, weight).to(half)
    assert torch.equal(rows.rescale(codes.clone(), per_row, weight), expected)


def test_narrowing_rounds_half_to_even_and_keeps_nan_and_infinity() -> None:
    one = torch.ones(1)
    exact = torch.tensor([[1 + 2**-7, 3.0, 1.5, float("inf"), -float("inf"), 1e-40, -0.0, float("nan")]]).bfloat16()
    scaled = rows.rescale(exact.clone(), torch.tensor([[1 + 2**-8]]), one)  # between two numbers of bfloat16
    assert torch.equal(scaled.nan_to_num(7.0), (exact.float() * (1 + 2**-8)).bfloat16().nan_to_num(7.0))
    nan = torch.tensor([[0x7F81, 0x7FFF, -1]], dtype=torch.int16).view(torch.bfloat16)  # rounding would carry over
    assert rows.rescale(nan.clone(), one[None], one).isnan().all()


def test_a_ternary_layer_under_autocast_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways the codes are exact; outputs and gradients differ by the rounding of bfloat16 alone."""
    torch.manual_seed(0)
    layer, x, grad = BitLinear(64, 40), draw(5, 7, 64), draw(5, 7, 40, seed=1)
    exact = x.clone().requires_grad_()
    y = layer(exact)
    expected = [y, *torch.autograd.grad(y, [exact, *layer.parameters()], grad)]
    for usable in (rows.usable, lambda *_, half=False: False):
        monkeypatch.setattr(rows, "usable", usable)
        for dtype in (torch.float32, torch.bfloat16):
            leaf = x.to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(leaf)
            assert y.dtype == torch.bfloat16
            found = [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad.bfloat16())]
            assert [g.dtype for g in found[1:]] == [dtype, *(p.dtype for p in layer.parameters())]
            for got, wanted in zip(found, expected, strict=True):
                difference = (got.float() - wanted).abs().max() / wanted.abs().max()
                assert difference < 0.02, difference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_tanh_and_its_gradients_equal_float64(shape: tuple[int, ...]) -> None:
    inputs = 4 * draw(*shape), torch.tensor([0.7]), draw(shape[-1], seed=1), draw(shape[-1], seed=2)
    grad, found = draw(*shape, seed=3), []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = dyt(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, grad.to(dtype))])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=3e-5)


def test_dynamic_tanh_is_exact_near_zero_saturates_and_keeps_nan() -> None:
    x = torch.tensor([[1e-20, -1e-8, 0.2999, 0.3001, 9.0, 200.0, float("inf"), -float("inf"), float("nan")]])
    y = dyt(x, torch.ones(1), torch.ones(9), torch.zeros(9))
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=1e-6, atol=0.0, equal_nan=True)


def test_dynamic_tanh_has_a_second_derivative() -> None:
    leaves = [t.requires_grad_() for t in (draw(3, 5), torch.tensor([0.7]), draw(5, seed=1), draw(5, seed=2))]
    (slope,) = torch.autograd.grad(dyt(*leaves).sum(), leaves[0], create_graph=True)
    found = torch.autograd.grad(slope.square().sum(), leaves[:3])
    exact = [t.detach().double().requires_grad_() for t in leaves]
    (slope,) = torch.autograd.grad(dyt(*exact).sum(), exact[0], create_graph=True)
    for got, expected in zip(found, torch.autograd.grad(slope.square().sum(), exact[:3]), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
