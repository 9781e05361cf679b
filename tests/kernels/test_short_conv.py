"""The C kernel of the short convolution against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.kernels import native, short_conv
from frankenstein.mixers.short_conv import ShortConv

pytestmark = pytest.mark.skipif(not native.available(short_conv.NAME), reason="needs a C compiler")
SHAPES = [
    (2, 9, 6, 3, -2),
    (1, 1, 64, 7, -3),
    (3, 40, 130, 4, -3),
    (2, 5, 64, 7, -3),
    (2, 2, 3, 7, -3),
]  # B T D C first


def draw(shape: tuple[int, ...]) -> list[Tensor]:
    rows, length, width, taps, _ = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, length, width), (width, taps), (width,), (rows, length, width)]
    return [torch.randn(s, generator=generator) for s in shapes]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
    padded = F.pad(x.mT, (-first, weight.shape[1] - 1 + first))
    return F.conv1d(padded, weight[:, None], bias, groups=x.shape[-1]).mT


def results(y: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_and_its_gradients_equal_float64(shape: tuple[int, ...], biased: bool) -> None:
    *inputs, grad = draw(shape)
    inputs = inputs if biased else inputs[:2]
    found = []
    for dtype, form in ((torch.float32, short_conv.convolve), (torch.float64, exact)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = form(*leaves, *([] if biased else [None]), shape[-1])
        found.append(results(y, leaves, grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_reads_either_type_computes_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    x, weight, bias, grad = draw((2, 11, 70, 4, -3))
    x, grad = x.to(dtype), grad.bfloat16()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = short_conv.convolve(*leaves, -3)
    wide = [t.float().requires_grad_() for t in (x, weight, bias)]
    expected = results(short_conv.convolve(*wide, -3), wide, grad)
    found = results(y, leaves, grad)
    assert y.dtype == torch.bfloat16 and [g.dtype for g in found[1:]] == [dtype, torch.float32, torch.float32]
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted.to(got.dtype))


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    x, weight, bias, grad = draw((3, 50, 200, 7, -3))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            found.append(results(short_conv.convolve(*leaves, -3), leaves, grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_takes_it_and_gives_what_torch_gives(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = ShortConv(10, 3, causal=causal, bias=True), torch.randn(2, 8, 20)[..., ::2]
    mask = torch.arange(8)[None] < torch.tensor([[8], [5]])
    assert short_conv.usable(x, layer.weight)
    native_y = layer(x, mask)
    monkeypatch.setattr(short_conv, "usable", lambda *_: False)
    torch.testing.assert_close(native_y, layer(x, mask), rtol=1e-5, atol=1e-6)
