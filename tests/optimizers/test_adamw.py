import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.adamw import AdamW


def test_the_first_step_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    p.grad = torch.tensor([0.5, -4.0, 0.0])
    AdamW([p], lr=0.1, weight_decay=0.2).step()
    # decay first: x (1 - 0.02); the bias-corrected first step is lr * sign(g)
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.1, -0.98 + 0.1, 0.49]))


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=torch.float64), torch.randn(50, 5, 3, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = AdamW([p], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    want, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        want = want * (1 - 0.02 * 0.1)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        want = want - 0.02 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    torch.testing.assert_close(p.data, want, rtol=1e-10, atol=1e-12)


def test_unknown_arguments_are_errors_also_in_a_group() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="amsgrad"):
        AdamW([p], amsgrad=True)  # type: ignore[call-arg]
    with pytest.raises(
        FrankensteinError, match=r"adamw has no argument 'momentum'; known: lr, weight_decay, betas, eps"
    ):
        AdamW([{"params": [p], "momentum": 0.9}])
    with pytest.raises(FrankensteinError, match=r"adamw: eps: found 0"):
        AdamW([{"params": [p], "eps": 0}])


def test_a_gradient_in_another_memory_layout_gives_the_same_step() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4), torch.randn(5, 6, 4)
    plain, turned = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one, two = AdamW([plain], lr=0.1), AdamW([turned], lr=0.1)
    for g in grads:
        plain.grad, turned.grad = g.clone(), g.T.contiguous().T
        assert turned.grad.stride() != turned.stride()
        one.step()
        two.step()
    assert torch.equal(plain, turned)
