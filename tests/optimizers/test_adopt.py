import torch

from frankenstein.optimizers.adopt import ADOPT


def test_the_first_step_moves_nothing_and_the_second_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    optimizer = ADOPT([p], lr=0.1, weight_decay=0.2)
    p.grad = torch.tensor([0.5, -4.0, 0.0])
    optimizer.step()
    assert p.tolist() == [2.0, -1.0, 0.5]
    p.grad = torch.tensor([0.25, -40.0, 3.0])
    optimizer.step()
    # g / |g_1| = 0.5, 10 and 3e6, the last two clipped to 1; m = 0.1 u
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.005, -0.98 + 0.01, 0.49 - 0.01]))


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3, dtype=torch.float64), torch.randn(50, 5, 3, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = ADOPT([p], lr=0.02, betas=(0.8, 0.95), eps=0.3, weight_decay=0.1)
    want, m, v = start.clone(), torch.zeros_like(start), grads[0] ** 2
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        if t == 1:
            continue
        u = (g / v.sqrt().clamp(min=0.3)).clamp(-((t - 1) ** 0.25), (t - 1) ** 0.25)
        m = 0.8 * m + 0.2 * u
        want = want * (1 - 0.02 * 0.1) - 0.02 * m
        v = 0.95 * v + 0.05 * g**2
    torch.testing.assert_close(p.data, want, rtol=1e-11, atol=1e-13)


def test_the_first_gradient_of_a_row_is_clipped() -> None:
    table = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = ADOPT([table], lr=1.0)
    for step in range(17):
        table.grad = torch.zeros(3, 2)
        table.grad[0] = 1.0
        if step == 16:
            table.grad[1] = 1e-2
        optimizer.step()
    torch.testing.assert_close(table.data[1], torch.full((2,), -0.1 * 16**0.25))  # and not -0.1 * 1e-2 / eps
    assert table.data[2].tolist() == [0.0, 0.0]
