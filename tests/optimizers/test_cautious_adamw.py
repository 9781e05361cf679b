import math

import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.cautious_adamw import CautiousAdamW

F64 = torch.float64


def test_two_steps_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=F64))
    optimizer = CautiousAdamW([p], lr=0.1, betas=(0.5, 0.5), eps=1e-12, weight_decay=0.2)
    p.grad = torch.tensor([0.5, -4.0, 0.0, 1.0], dtype=F64)
    optimizer.step()
    # three of four agree: scaled by 4/3
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.4 / 3, -0.98 + 0.4 / 3, 0.49, 2.94 - 0.4 / 3], dtype=F64))
    start = p.detach().clone()
    p.grad = torch.tensor([-0.1, -4.0, 0.0, -2.0], dtype=F64)
    optimizer.step()
    # m = 0.075, -3, 0, -0.75: the first disagrees with its gradient, so it is only decayed; scaled by 4/2
    step = 2 * 0.1 * math.sqrt(0.75) / 0.75
    move = torch.tensor([0.0, -step * 3 / math.sqrt(12.0), 0.0, -step * 0.75 / math.sqrt(2.25)], dtype=F64)
    torch.testing.assert_close(p.data, start * 0.98 - move)


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=F64), torch.randn(50, 5, 3, dtype=F64)
    p = torch.nn.Parameter(start.clone())
    optimizer = CautiousAdamW([p], lr=0.02, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1, cautious_clip=0.7)
    want, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    floors = 0
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        mask = (m * g > 0).double()
        floors += int(mask.mean() < 0.7)
        mask = mask / mask.mean().clamp(min=0.7)
        step = 0.02 * math.sqrt(1 - 0.95**t) / (1 - 0.8**t)
        want = want * (1 - 0.02 * 0.1) - step * m * mask / (v.sqrt() + 1e-2)
    assert 5 < floors < 45
    torch.testing.assert_close(p.data, want, rtol=1e-11, atol=1e-13)


def test_where_all_signs_agree_it_is_adamw() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, 3, dtype=F64))
    q = torch.nn.Parameter(p.detach().clone())
    ours = CautiousAdamW([p], lr=0.02, eps=1e-14, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=0.02, eps=1e-14, weight_decay=0.1)
    sign = torch.randn_like(p).sign()
    for _ in range(20):
        p.grad = torch.rand_like(p) * sign
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.data, q.data, rtol=1e-10, atol=1e-12)


def test_the_mask_of_a_large_tensor_is_counted_exactly_and_bounded_below() -> None:
    p = torch.nn.Parameter(torch.zeros(300_000))
    p.grad = torch.zeros(300_000)
    p.grad[:250_001] = 1.0
    optimizer = CautiousAdamW([p], lr=1.0, betas=(0.0, 0.0), eps=1e-12)
    optimizer.step()
    torch.testing.assert_close(p.data[:2], torch.full((2,), -300_000 / 250_001), rtol=2e-7, atol=0)
    few = torch.nn.Parameter(torch.zeros(5000))
    few.grad = torch.zeros(5000)
    few.grad[0] = 1.0
    CautiousAdamW([few], lr=1.0, betas=(0.0, 0.0), eps=1e-12).step()
    torch.testing.assert_close(few.data[:2], torch.tensor([-1000.0, 0.0]))  # 1 / 1e-3 and not 5000


def test_the_clip_is_a_share() -> None:
    with pytest.raises(FrankensteinError, match="cautious_adamw: cautious_clip: found 2"):
        CautiousAdamW([torch.nn.Parameter(torch.zeros(2))], cautious_clip=2.0)
