import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.sgd_momentum import SGDMomentum


@pytest.mark.parametrize(
    ("nesterov", "second"), [(False, 0.1 * (0.9 * 1.2 + 1.088)), (True, 0.1 * (1.088 + 0.9 * 2.168))]
)
def test_two_steps_by_hand(nesterov: bool, second: float) -> None:
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = SGDMomentum([p], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    p.grad = torch.tensor([1.0])
    optimizer.step()  # g = 1 + 0.1 * 2 = 1.2, and the first buffer is g
    first = 0.1 * (1.2 + 0.9 * 1.2) if nesterov else 0.1 * 1.2
    torch.testing.assert_close(p.data, torch.tensor([2.0 - first]))
    p.data.fill_(0.88)
    p.grad = torch.tensor([1.0])
    optimizer.step()  # g = 1.088, buffer = 0.9 * 1.2 + 1.088 = 2.168
    torch.testing.assert_close(p.data, torch.tensor([0.88 - second]))


def test_nesterov_without_momentum_is_an_error_also_in_a_group() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(FrankensteinError, match="nesterov=True needs a momentum above 0"):
        SGDMomentum([p], momentum=0, nesterov=True)
    with pytest.raises(FrankensteinError, match="nesterov=True needs a momentum above 0"):
        SGDMomentum([{"params": [p], "momentum": 0.0}], nesterov=True)
    with pytest.raises(TypeError, match="dampening"):
        SGDMomentum([p], dampening=0.5)  # type: ignore[call-arg]
