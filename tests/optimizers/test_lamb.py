import pytest
import torch

from frankenstein.optimizers.lamb import LAMB

F64 = torch.float64


def test_the_first_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=F64))
    p.grad = torch.tensor([0.5, -7.0], dtype=F64)
    LAMB([p], lr=0.1, eps=1e-12, weight_decay=0.0).step()
    # ||theta|| = 5, u = (1, -1)
    torch.testing.assert_close(p.data, torch.tensor([3.0, -4.0], dtype=F64) - 0.5 / 2**0.5 * torch.tensor([1.0, -1.0]))


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    starts, grads = [torch.randn(5, 3, dtype=F64), torch.randn(4, dtype=F64)], torch.randn(50, 19, dtype=F64)
    members = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = LAMB(members, lr=0.02, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1)
    want = [start.clone() for start in starts]
    m, v = ([torch.zeros_like(start) for start in starts] for _ in range(2))
    for t, g in enumerate(grads, 1):
        for i, (p, part) in enumerate(zip(members, g.split([15, 4]), strict=True)):
            p.grad = part.reshape(p.shape).clone()
            m[i], v[i] = 0.8 * m[i] + 0.2 * p.grad, 0.95 * v[i] + 0.05 * p.grad**2
            u = (m[i] / (1 - 0.8**t)) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-2) + 0.1 * want[i]
            want[i] = want[i] - 0.02 * want[i].norm() / u.norm() * u
        optimizer.step()
    for p, expected in zip(members, want, strict=True):
        torch.testing.assert_close(p.data, expected, rtol=1e-11, atol=1e-13)


def test_the_ratio_is_one_where_a_norm_is_zero() -> None:
    zero, still = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = LAMB([zero, still], lr=0.1, eps=1e-12, weight_decay=0.0)
    zero.grad, still.grad = torch.tensor([2.0, -3.0, 0.0]), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(zero.data, torch.tensor([-0.1, 0.1, 0.0]))
    assert still.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_the_relative_move_does_not_depend_on_scale(factor: float) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4, dtype=F64))
    q = torch.nn.Parameter(p.detach() * factor)
    first, second = (LAMB([member], lr=0.02, eps=1e-14, weight_decay=0.0) for member in (p, q))
    for _ in range(5):
        p.grad = torch.randn_like(p)
        q.grad = p.grad / factor
        first.step()
        second.step()
    torch.testing.assert_close(q.data, p.data * factor, rtol=1e-7, atol=0)


def test_the_decay_is_inside_the_update() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=F64))
    p.grad = torch.zeros(2, dtype=F64)
    LAMB([p], lr=0.1, weight_decay=0.01).step()
    # u = wd theta, whose norm the ratio takes away: a step of lr ||theta||, whatever wd is
    torch.testing.assert_close(p.data, torch.tensor([2.7, -3.6], dtype=F64))
