from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.sophia import Sophia

FROZEN = load_file(Path(__file__).with_name("sophia.safetensors"))  # SophiaG at a7e15722, its defaults


def test_two_steps_by_hand() -> None:
    p = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 1.0]))
    optimizer = Sophia([p], lr=0.1, betas=(0.5, 0.75), rho=0.5, bs=4, weight_decay=0.2)
    p.grad = torch.tensor([0.5, -4.0, 0.0, 1e-20])
    optimizer.step()
    # no estimate yet: the sign of m, except where |m| is far below 1e-15; the decay is 0.02
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.1, -0.98 + 0.1, 0.49, 0.98 - 5e-7]))
    p.grad = torch.tensor([1.0, 2.0, 0.0, 0.0])
    optimizer.update_hessian()  # h = (0.25, 1, 0, 0)
    p.grad = torch.tensor([0.0, -6.0, 0.0, 0.0])
    optimizer.step()
    # m = (0.125, -4, 0, 2.5e-21), rho bs h = (0.5, 2, 0, 0): a quarter step, a clipped one, none, almost none
    want = torch.tensor([1.86 * 0.98 - 0.025, -0.88 * 0.98 + 0.1, 0.49 * 0.98, (0.98 - 5e-7) * 0.98 - 2.5e-7])
    torch.testing.assert_close(p.data, want)


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 50, 5, 3, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    optimizer = Sophia([p], lr=0.02, betas=(0.8, 0.95), rho=0.1, weight_decay=0.1)
    theta, m, h = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, (g, sampled) in enumerate(zip(*gradients, strict=True)):
        if t % 4 == 3:
            p.grad = 0.1 * sampled
            optimizer.update_hessian()
            h = 0.95 * h + 0.05 * (0.1 * sampled).square()
        p.grad = g.clone()
        optimizer.step(bs=1000 + t)
        theta = theta * (1 - 0.02 * 0.1)
        m = 0.8 * m + 0.2 * g
        theta = theta - 0.02 * m.sign() * (m.abs() / (0.1 * (1000 + t) * h + 1e-15)).clamp(max=1)
    torch.testing.assert_close(p.data, theta, rtol=1e-11, atol=1e-13)


def test_twelve_steps_equal_frozen_numbers() -> None:
    members = {key: nn.Parameter(FROZEN[f"init/{key}"].clone()) for key in ("emb", "bias", "scalar")}
    optimizer = Sophia(list(members.values()))
    for step in range(1, 13):
        for kind in ("hess_grad", "grad"):
            if f"{kind}{step - 1:02d}/emb" not in FROZEN:
                continue
            for key, p in members.items():
                p.grad = FROZEN[f"{kind}{step - 1:02d}/{key}"].clone()
            optimizer.step() if kind == "grad" else optimizer.update_hessian()
        for key, p in members.items():
            if f"step{step:02d}/{key}" in FROZEN:
                torch.testing.assert_close(p.data, FROZEN[f"step{step:02d}/{key}"], rtol=0, atol=1e-6)


def test_a_hessian_estimate_moves_nothing_and_counts_no_step() -> None:
    p, without = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([p, without], betas=(0.9, 0.75))
    for _ in range(2):
        p.grad = torch.tensor([1.0, -2.0, 0.0])
        optimizer.update_hessian()
    assert torch.equal(p.data, torch.ones(3)) and torch.equal(p.grad, torch.tensor([1.0, -2.0, 0.0]))
    state = optimizer.state[p]
    assert state["step"] == 0 and torch.equal(state["m"], torch.zeros(3))
    torch.testing.assert_close(state["h"], torch.tensor([1.0, 4.0, 0.0]) * (1 - 0.75**2))
    assert without not in optimizer.state


def test_bs_of_a_step_may_be_a_tensor_and_holds_for_that_step() -> None:
    results = []
    for argument in (300, 300.0, torch.tensor(300), None):
        p = nn.Parameter(torch.ones(4))
        optimizer = Sophia([p], lr=0.1, bs=7 if argument is not None else 300, weight_decay=0.0)
        p.grad = torch.tensor([0.1, 0.2, -0.3, 1.0])
        optimizer.update_hessian()
        optimizer.step(bs=argument)
        optimizer.param_groups[0]["bs"] = 7
        optimizer.step()
        results.append(p.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert (results[0] != 1).all() and abs(results[0][3] - 1) < 0.15  # clipped in one step at most


@pytest.mark.parametrize("bs", [0, -5, float("nan")])
def test_a_step_over_no_terms_is_an_error(bs: float) -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = Sophia([p])
    with pytest.raises(FrankensteinError, match=r"sophia: bs: found .*: expected a number above 0"):
        optimizer.step(bs=bs)
    assert torch.equal(p.data, torch.ones(2))


def test_groups_have_their_own_values_but_one_interval() -> None:
    members = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Sophia([{"params": members[:1], "rho": 0.5}, {"params": members[1:]}], lr=0.1, bs=2, weight_decay=0.0)
    for p in members:
        p.grad = torch.tensor([1.0, 1.0])
    optimizer.update_hessian()
    optimizer.step()  # m = 0.035, h = 0.01: 0.035 / (0.5 2 0.01) is clipped too
    torch.testing.assert_close(members[0].data, members[1].data)
    optimizer.step(bs=100)  # m = 0.068775: 0.068775 / 0.5 and clipped
    torch.testing.assert_close(members[0].data, torch.full((2,), 0.9 - 0.0137550))
    torch.testing.assert_close(members[1].data, torch.full((2,), 0.8))
    with pytest.raises(FrankensteinError, match=r"sophia: update_k: found 5: expected 10 in all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "update_k": 5})
    assert len(optimizer.param_groups) == 2 and optimizer.update_k == 10


def test_a_step_reads_no_value_from_the_device() -> None:
    p = nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = Sophia([p])
    p.grad = torch.empty_like(p)
    optimizer.update_hessian()
    optimizer.step(bs=torch.empty((), dtype=torch.int64, device="meta"))  # meta raises when asked for a value
    assert optimizer.state[p]["step"] == 1
