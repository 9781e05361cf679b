import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.adan import Adan


def test_the_first_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    p.grad = torch.tensor([0.5, -4.0, 0.0])
    Adan([p], lr=0.1, weight_decay=0.2).step()
    # no difference yet, so the bias-corrected step is lr * sign(g); then the proximal decay
    torch.testing.assert_close(p.data, torch.tensor([1.9, -0.9, 0.5]) / 1.02)


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=torch.float64), torch.randn(50, 5, 3, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = Adan([p], lr=0.02, betas=(0.9, 0.7, 0.95), eps=1e-3, weight_decay=0.1)
    want, before = start.clone(), grads[0]
    m, s, n = (torch.zeros_like(start) for _ in range(3))
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        d = g - before
        m, s, n = 0.9 * m + 0.1 * g, 0.7 * s + 0.3 * d, 0.95 * n + 0.05 * (g + 0.7 * d) ** 2
        u = (m / (1 - 0.9**t) + 0.7 * s / (1 - 0.7**t)) / ((n / (1 - 0.95**t)).sqrt() + 1e-3)
        want, before = (want - 0.02 * u) / (1 + 0.02 * 0.1), g
    torch.testing.assert_close(p.data, want, rtol=1e-11, atol=1e-13)


def test_the_previous_gradient_is_its_own_also_when_the_gradient_is_reused() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    first, second = Adan([p]), Adan([q])
    p.grad = torch.zeros_like(p)
    for step in range(4):
        fresh = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        p.grad.zero_().add_(fresh)  # as zero_grad(set_to_none=False) and accumulation do
        q.grad = fresh
        first.step()
        second.step()
    assert torch.equal(p, q)


def test_it_takes_three_betas() -> None:
    with pytest.raises(FrankensteinError, match="adan: betas: found"):
        Adan([torch.nn.Parameter(torch.zeros(2))], betas=(0.9, 0.99))  # type: ignore[arg-type]
