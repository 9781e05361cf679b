import math

import pytest
import torch

from frankenstein.optimizers.ademamix import AdEMAMix, slow_beta

F64 = torch.float64


def problem() -> tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=F64), torch.randn(50, 5, 3, dtype=F64)
    return torch.nn.Parameter(start.clone()), start, grads


def test_the_first_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=F64))
    p.grad = torch.tensor([0.5, -4.0, 0.0], dtype=F64)
    AdEMAMix([p], lr=0.1, betas=(0.9, 0.999, 0.75), alpha=4.0, weight_decay=0.2).step()
    # m1hat = g and m2 = g / 4, not corrected: (1 + 4 / 4) sign(g)
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.2, -0.98 + 0.2, 0.49], dtype=F64))


@pytest.mark.parametrize("warmups", [{}, {"alpha_warmup": 20, "beta3_warmup": 30}], ids=["plain", "warmups"])
def test_fifty_steps_equal_the_published_rule_in_double_precision(warmups: dict[str, int]) -> None:
    p, want, grads = problem()
    optimizer = AdEMAMix([p], lr=0.02, betas=(0.8, 0.95, 0.999), alpha=5.0, eps=1e-3, weight_decay=0.1, **warmups)
    m1, m2, v = (torch.zeros_like(want) for _ in range(3))
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        alpha, beta3 = 5.0, 0.999
        if warmups:
            alpha = 5.0 * min(1, t / 20)
            f = [math.log(0.5) / math.log(b) - 1 for b in (0.8, 0.999)]
            mean = (1 - t / 30) * f[0] + t / 30 * f[1]
            beta3 = 0.5 ** (1 / (mean + 1)) if t < 30 else 0.999
        m1, m2, v = 0.8 * m1 + 0.2 * g, beta3 * m2 + (1 - beta3) * g, 0.95 * v + 0.05 * g * g
        u = (m1 / (1 - 0.8**t) + alpha * m2) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        want = want - 0.02 * (u + 0.1 * want)
    torch.testing.assert_close(p.data, want, rtol=1e-11, atol=1e-13)


def test_without_the_slow_average_it_is_adamw() -> None:
    p, start, grads = problem()
    q = torch.nn.Parameter(start.clone())
    ours = AdEMAMix([p], lr=0.02, betas=(0.8, 0.95, 0.9), alpha=0.0, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    for g in grads:
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.data, q.data, rtol=1e-11, atol=1e-13)


def test_the_slow_beta_rises_linearly_in_its_half_life() -> None:
    half_lives = [math.log(0.5) / math.log(slow_beta(t, 0.9, 0.9999, 1000)) for t in (250, 500, 750)]
    assert half_lives[2] - half_lives[1] == pytest.approx(half_lives[1] - half_lives[0])
    assert 0.9 < slow_beta(1, 0.9, 0.9999, 1000) < slow_beta(2, 0.9, 0.9999, 1000)
    assert slow_beta(1000, 0.9, 0.9999, 1000) == slow_beta(5000, 0.9, 0.9999, 1000) == 0.9999
    assert slow_beta(1, 0.9, 0.9999, None) == 0.9999


def test_the_slow_beta_may_start_or_stay_at_zero() -> None:
    assert slow_beta(5, 0.0, 0.5, 10) == pytest.approx(0.25)  # half of a half-life of 1 step
    assert slow_beta(5, 0.0, 0.0, 10) == 0.0
