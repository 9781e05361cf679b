import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.lion import Lion


def test_two_steps_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    p.grad = torch.tensor([0.5, -4.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.1, -0.98 + 0.1, 0.49]))
    # m = (0.25, -2, 0), kept by beta2; beta1 weighs it against the next gradient: 0.225 - 0.2 > 0, -1.8 + 3 > 0
    p.grad = torch.tensor([-2.0, 30.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([1.86 * 0.98 - 0.1, -0.88 * 0.98 - 0.1, 0.49 * 0.98]))


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=torch.float64), torch.randn(50, 5, 3, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = Lion([p], lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    want, m = start.clone(), torch.zeros_like(start)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        want = want * (1 - 0.02 * 0.1) - 0.02 * (0.8 * m + 0.2 * g).sign()
        m = 0.95 * m + 0.05 * g
    torch.testing.assert_close(p.data, want, rtol=1e-12, atol=1e-14)


def test_without_momentum_it_is_sign_descent() -> None:
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Lion([p], lr=0.5, betas=(0.0, 0.99))
    for g in ([1e-9, -3.0, 0.0, 2.0], [1e9, 1.0, 0.0, -1.0]):
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    assert p.tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_it_has_one_state_tensor_and_no_eps() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(FrankensteinError, match="lion has no argument 'eps'"):
        Lion([{"params": [p], "eps": 1e-8}])
    optimizer = Lion([p])
    p.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "m"}
