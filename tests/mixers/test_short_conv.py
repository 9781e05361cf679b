import pytest
import torch

from frankenstein.mixers.short_conv import ShortConv

F64 = torch.float64


def explicit(conv: ShortConv, x: torch.Tensor) -> torch.Tensor:
    """The sum in the module's docstring, token by token."""
    first = -(conv.size - 1)
    y = torch.zeros_like(x) + (0 if conv.bias is None else conv.bias)
    for t in range(x.shape[1]):
        for tap in range(conv.weight.shape[1]):
            if 0 <= t + first + tap < x.shape[1]:
                y[:, t] += conv.weight[:, tap] * x[:, t + first + tap]
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_it_is_the_sum_it_says(length: int, causal: bool, bias: bool) -> None:
    torch.manual_seed(0)
    conv = ShortConv(6, 3, causal=causal, bias=bias).double()
    x = torch.randn(2, length, 6, dtype=F64)
    torch.testing.assert_close(conv(x), explicit(conv, x))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_gives_nothing_and_comes_out_as_zero(causal: bool) -> None:
    torch.manual_seed(0)
    conv = ShortConv(6, 4, causal=causal, bias=True).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 9, 6, dtype=F64)
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    y = conv(x.masked_fill(~mask[..., None], 1e6), mask)
    torch.testing.assert_close(y[1, :5], conv(x[1:, :5])[0])
    torch.testing.assert_close(y[0], conv(x[:1])[0])
    assert y[1, 5:].abs().max() == 0


def test_a_causal_filter_sees_no_future() -> None:
    conv, x = ShortConv(3, 4, causal=True), torch.randn(1, 8, 3)
    changed = x.clone()
    changed[:, 5:] = 9.0
    assert torch.equal(conv(x)[:, :5], conv(changed)[:, :5])
