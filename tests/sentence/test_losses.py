"""The cosine loss against values worked by hand, and its gradient against finite differences."""

import pytest
import torch

from frankenstein.errors import NotBuiltYetError
from frankenstein.registry import UnknownNameError
from frankenstein.sentence.losses import ANNOUNCED_LOSSES, LOSSES, cosine_regression, pair_loss
from frankenstein.sentence.options import SbertOptions


def test_cosine_loss_is_the_value_worked_by_hand() -> None:
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    targets = torch.tensor([0.46, 0.5, -0.4])  # cosines 0.96, 0 and -1; errors 0.5, -0.5 and -0.6
    assert cosine_regression(first, second, targets).item() == pytest.approx((0.25 + 0.25 + 0.36) / 3)


def test_cosine_loss_does_not_depend_on_lengths() -> None:
    first, second = torch.randn(5, 8), torch.randn(5, 8)
    targets = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(
        cosine_regression(7 * first, 0.2 * second, targets), cosine_regression(first, second, targets)
    )


def test_cosine_loss_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    targets = torch.tensor([1.0, 0.0, -0.4, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: cosine_regression(a, b, targets), (first, second))


def test_every_loss_of_the_contract_is_built_or_refused_as_not_built() -> None:
    names = SbertOptions.__dataclass_fields__["loss"].metadata["schema"]["enum"]
    assert sorted(names) == sorted([*LOSSES, *ANNOUNCED_LOSSES])
    for name in ANNOUNCED_LOSSES:
        with pytest.raises(NotBuiltYetError, match=f"{name!r} is not built yet; built: cosine"):
            pair_loss(name)


def test_an_unknown_loss_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown sentence loss 'cosin'; known: cosine; did you mean 'cosine'"):
        pair_loss("cosin")
