"""The CPU form of rms_norm against torch's composed one; values and first gradients stand in test_norms.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.model.norms import rms_norm


def draw(*shape: int, dtype: torch.dtype = torch.float64, offset: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(offset)).requires_grad_()


def test_first_and_second_derivatives_agree_with_differences() -> None:
    x, weight = draw(2, 3, 5), draw(5, offset=1)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradgradcheck(rms_norm, (x, weight))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 7), (2, 3, 4, 7)], ids=str)
def test_any_number_of_dimensions_equals_torch(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape), draw(7, offset=1)
    y, expected = rms_norm(x, weight, 1e-3), F.rms_norm(x, (7,), weight, 1e-3)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(o.sin().sum(), (x, weight)) for o in (y, expected))
    torch.testing.assert_close(found, wanted)


def test_inputs_that_are_not_contiguous_and_broadcast_gradients_equal_torch() -> None:
    x, weight = draw(4, 6, 5), draw(6, offset=1)
    outputs = (
        f(x.transpose(1, 2)) for f in (lambda x: rms_norm(x, weight), lambda x: F.rms_norm(x, (6,), weight, 1e-6))
    )
    found, wanted = (torch.autograd.grad(y.sum(), (x, weight)) for y in outputs)
    torch.testing.assert_close(found, wanted)


def test_backward_inside_autocast_stays_in_float32() -> None:
    x, weight = draw(64, 256, dtype=torch.float32), draw(256, dtype=torch.float32, offset=1)
    loss = (rms_norm(x, weight) * draw(64, 256, dtype=torch.float32, offset=2).detach()).sum()
    outside = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_a_frozen_weight_gets_no_gradient_and_changes_none() -> None:
    x, weight = draw(3, 7), draw(7, offset=1)
    (with_weight, _), (alone,) = (
        torch.autograd.grad(rms_norm(x, w).sin().sum(), inputs)
        for w, inputs in ((weight, (x, weight)), (weight.detach(), (x,)))
    )
    torch.testing.assert_close(alone, with_weight, rtol=0, atol=0)


def test_the_forward_has_the_same_bits_with_and_without_gradients() -> None:
    x, weight = draw(5, 64, dtype=torch.float32), draw(64, dtype=torch.float32, offset=1)
    with torch.inference_mode():
        alone = rms_norm(x, weight)
    assert torch.equal(alone, rms_norm(x, weight).detach())
