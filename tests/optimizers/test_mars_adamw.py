import io

import pytest
import torch
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.mars_adamw import MARSAdamW

F64 = torch.float64


def test_the_first_step_by_hand() -> None:
    p = nn.Parameter(torch.tensor([[2.0, -1.0, 0.5]], dtype=F64))
    p.grad = torch.tensor([[3.0, -4.0, 0.0]], dtype=F64)
    optimizer = MARSAdamW([p], lr=0.1, betas=(0.5, 0.99), weight_decay=0.2, gamma=1.0)
    optimizer.step()
    # g_0 = 0: c = 2 g, of norm 10, so c / 10; then Adam's first step
    torch.testing.assert_close(p.data, torch.tensor([[1.96 - 0.1, -0.98 + 0.1, 0.49]], dtype=F64))
    torch.testing.assert_close(optimizer.state[p]["m"], torch.tensor([[0.3, -0.4, 0.0]], dtype=F64))


@pytest.mark.parametrize("gamma", [0.025, 0.9])
def test_fifty_steps_equal_the_published_rule_in_double_precision(gamma: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=F64)
    grads = torch.randn(50, 5, 3, dtype=F64) * torch.linspace(0.01, 2, 50, dtype=F64).view(-1, 1, 1)
    p = nn.Parameter(start.clone())
    optimizer = MARSAdamW([p], lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, gamma=gamma)
    want, before = start.clone(), torch.zeros_like(start)
    m, v = torch.zeros_like(start), torch.zeros_like(start)
    clipped = 0
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        c = g + gamma * 0.8 / 0.2 * (g - before)
        clipped += int(c.norm() > 1)
        c, before = c / c.norm().clamp(min=1), g
        m, v = 0.8 * m + 0.2 * c, 0.95 * v + 0.05 * c * c
        u = m / (((v / (1 - 0.95**t)).sqrt() + 1e-3) * (1 - 0.8**t))
        want = want - 0.02 * (0.1 * want + u)
    assert 5 < clipped < 50
    torch.testing.assert_close(p.data, want, rtol=1e-11, atol=1e-13)


def test_vectors_take_adamw_with_their_own_settings() -> None:
    torch.manual_seed(0)
    members = [nn.Parameter(torch.randn(4, dtype=F64)), nn.Parameter(torch.randn((), dtype=F64))]
    twins = [nn.Parameter(p.detach().clone()) for p in members]
    groups = [{"params": members, "lr": 0.02, "eps": 1e-4, "betas_1d": (0.7, 0.9)}]
    ours = MARSAdamW(groups, lr=0.1, lr_1d=0.05, weight_decay_1d=0.3, weight_decay=9.0)
    theirs = torch.optim.AdamW(twins, lr=0.02 * 0.05 / 0.1, eps=1e-4, betas=(0.7, 0.9), weight_decay=0.3)
    for _ in range(20):
        for p, q in zip(members, twins, strict=True):
            p.grad = 10 * torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(members, twins, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-11, atol=1e-13)
    assert set(ours.state[members[0]]) == {"step", "m", "v"}


def test_vectors_take_the_method_itself_where_asked() -> None:
    row, vector = (nn.Parameter(torch.linspace(-1, 1, 5).view(shape)) for shape in ((1, 5), (5,)))
    optimizer = MARSAdamW([row, vector], lr=0.05, optimize_1d=True)
    for seed in range(4):
        row.grad = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
        vector.grad = row.grad.view(5).clone()
        optimizer.step()
    assert torch.equal(row.view(5), vector)


def test_without_correction_and_clipping_it_is_adamw() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(7, 3, dtype=F64))
    q = nn.Parameter(p.detach().clone())
    ours = MARSAdamW([p], lr=0.02, gamma=0.0, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=0.02, betas=(0.95, 0.99), weight_decay=0.1)
    for _ in range(20):
        p.grad = 0.01 * torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.data, q.data, rtol=1e-10, atol=1e-12)


def test_the_previous_gradient_is_its_own_also_when_the_gradient_is_reused() -> None:
    p, q = (nn.Parameter(torch.ones(3, 2, dtype=F64)) for _ in range(2))
    first, second = MARSAdamW([p], gamma=0.5), MARSAdamW([q], gamma=0.5)
    p.grad = torch.zeros_like(p)
    for step in range(4):
        fresh = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(step))
        p.grad.zero_().add_(fresh)  # as zero_grad(set_to_none=False) and accumulation do
        q.grad = fresh
        first.step()
        second.step()
    assert torch.equal(p, q)


def test_a_resumed_run_keeps_the_rate_that_vectors_are_relative_to() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = MARSAdamW([p], lr=0.5, lr_1d=0.1, weight_decay_1d=0.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = MARSAdamW([p])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.step()
    torch.testing.assert_close(p.data, torch.full((3,), 0.9))


def test_a_rate_of_zero_moves_no_vector_and_cannot_be_what_others_are_relative_to() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    MARSAdamW([p], lr=0.0).step()
    assert p.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(FrankensteinError, match=r"mars_adamw: lr: found 0, and 0\.1 in a group"):
        MARSAdamW([{"params": [p], "lr": 0.1}], lr=0.0)
