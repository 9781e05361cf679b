"""The C kernel of rotary positions against the complex product in float64."""

import pytest
import torch
from torch import Tensor

from frankenstein.kernels import native, rotary
from frankenstein.model.positions import Rotary, rotary_table

pytestmark = pytest.mark.skipif(not native.available(rotary.NAME), reason="needs a C compiler")
SHAPES = [(2, 9, 3, 8), (1, 1, 1, 2), (3, 130, 4, 64), (2, 5, 2, 6)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_and_its_gradient_equal_float64(shape: tuple[int, ...], pairing: str) -> None:
    turn, found = Rotary(pairing=pairing), []
    for dtype in (torch.float32, torch.float64):
        x = draw(*shape).to(dtype).requires_grad_()
        assert rotary.usable(x) == (dtype == torch.float32)
        y = turn(x)
        found.append([y, *torch.autograd.grad(y, x, draw(*shape, seed=1).to(dtype))])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_bfloat16_is_turned_in_float32_and_rounded_once(split: bool) -> None:
    x, table = draw(2, 70, 3, 16).bfloat16(), rotary_table(70, 16, 10000.0, torch.float32)
    y = rotary.rotate(x, table, split=split)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rotary.rotate(x.float(), table, split=split).bfloat16())


def test_heads_and_tokens_may_lie_anywhere_in_memory() -> None:
    table = rotary_table(7, 8, 10000.0, torch.float32)
    whole = draw(2, 7, 5, 8)
    views = [whole[:, :, 1:4], whole[:, :, ::2], whole.flip(0)[..., ::2].repeat_interleave(2, -1).mT.mT]
    views += [draw(2, 5, 7, 8).transpose(1, 2), draw(2, 7, 5, 16)[..., ::2], draw(1, 7, 5, 8).expand(3, -1, -1, -1)]
    for x in views:
        assert torch.equal(rotary.rotate(x, table, split=False), rotary.rotate(x.clone(), table, split=False))


def test_a_wide_head_goes_through_torch() -> None:
    x = draw(1, 3, 1, 2 * native.constant("widest", rotary.NAME))
    assert not rotary.usable(x)
    torch.testing.assert_close(Rotary()(x).double(), Rotary()(x.double()), rtol=1e-6, atol=1e-6)
