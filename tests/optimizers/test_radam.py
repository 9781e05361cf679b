import math

import pytest
import torch

from frankenstein.optimizers.radam import RAdam, rectify


def test_the_first_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    p.grad = torch.tensor([0.5, -4.0, 0.0])
    RAdam([p], lr=0.1, weight_decay=0.2).step()
    # too few samples: the averaged gradient itself, not its sign; decay is decoupled
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.05, -0.98 + 0.4, 0.49]))


@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.9, 0.999), (0.5, 0.5)], ids=str)
def test_fifty_steps_equal_the_published_rule_in_double_precision(betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=torch.float64), torch.randn(50, 5, 3, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = RAdam([p], lr=0.02, betas=betas, eps=1e-3, weight_decay=0.1)
    want, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    b1, b2 = betas
    limit = 2 / (1 - b2) - 1
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        want = want * (1 - 0.02 * 0.1)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        r = limit - 2 * t * b2**t / (1 - b2**t)
        if r > 5:
            factor = math.sqrt((r - 4) * (r - 2) * limit / ((limit - 4) * (limit - 2) * r))
            want = want - 0.02 * factor * m / (1 - b1**t) * math.sqrt(1 - b2**t) / (v.sqrt() + 1e-3)
        else:
            want = want - 0.02 * m / (1 - b1**t)
    torch.testing.assert_close(p.data, want, rtol=1e-11, atol=1e-13)


def test_it_equals_torch_with_decoupled_decay() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    q = torch.nn.Parameter(p.detach().clone())
    ours = RAdam([p], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.RAdam([q], lr=0.02, weight_decay=0.1, decoupled_weight_decay=True)
    for _ in range(20):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.data, q.data, rtol=1e-10, atol=1e-12)


def test_the_rectification_starts_after_five_steps_and_tends_to_one() -> None:
    assert [rectify(t, 0.999) is None for t in range(1, 8)] == [True] * 5 + [False] * 2
    factors = [rectify(t, 0.999) or 0.0 for t in (6, 100, 1000, 100_000)]
    assert factors == sorted(factors) and factors[0] < 0.05 and factors[-1] == pytest.approx(1, abs=1e-6)
    assert all(rectify(t, 0.5) is None for t in range(1, 60))  # never more than 3 samples
