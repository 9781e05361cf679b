import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.schedulefree_adamw import ScheduleFreeAdamW

FROZEN = load_file(Path(__file__).with_name("schedulefree_adamw.safetensors"))  # schedulefree at 70785b53, its defaults


def set_gradients(members: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in members:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def members_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(77)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((5, 3), (4,), ())]


def walk(optimizer: ScheduleFreeAdamW, members: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(members, step)
        optimizer.step()


def copies(members: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in members]


@pytest.mark.parametrize("settings", [(0, 0.0, 2.0), (7, 1.5, 1.0), (60, 0.0, 2.0)], ids=str)
def test_fifty_steps_equal_the_rule_in_x_y_and_z(settings: tuple[int, float, float]) -> None:
    warmup, r, power = settings
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3, dtype=torch.float64), torch.randn(50, 5, 3, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    arguments: dict[str, Any] = {"warmup_steps": warmup, "r": r, "weight_lr_power": power}
    optimizer = ScheduleFreeAdamW([p], betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, **arguments)
    x, z, v, largest, total = start.clone(), start.clone(), torch.zeros_like(start), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        lr = optimizer.param_groups[0]["lr"] = 0.02 if t % 5 else 0.03
        y = 0.2 * z + 0.8 * x
        torch.testing.assert_close(p.data, y, rtol=1e-11, atol=1e-13)
        p.grad = g.clone()
        optimizer.step()
        v = 0.95 * v + 0.05 * g * g
        eta = lr * min(1, t / warmup) if warmup else lr
        largest = max(largest, eta)
        weight = t**r * largest**power
        total += weight
        z = z - eta * (g / ((v / (1 - 0.95**t)).sqrt() + 1e-4) + 0.1 * y)
        x = (1 - weight / total) * x + weight / total * z
    optimizer.eval()
    torch.testing.assert_close(p.data, x, rtol=1e-11, atol=1e-13)


def test_twelve_steps_in_both_modes_equal_frozen_numbers() -> None:
    members = {key: nn.Parameter(FROZEN[f"init/{key}"].clone()) for key in ("emb", "bias", "scalar")}
    optimizer = ScheduleFreeAdamW(list(members.values()))
    compared = 0
    for step in range(1, 13):
        for key, p in members.items():
            p.grad = FROZEN[f"grad{step - 1:02d}/{key}"].clone()
        optimizer.step()
        for mode in (optimizer.eval, optimizer.train):
            mode()
            for key, p in members.items():
                name = f"{'eval' if optimizer.averaged else 'step'}{step:02d}/{key}"
                if name in FROZEN:
                    torch.testing.assert_close(p.data, FROZEN[name], rtol=0, atol=1e-6)
                    compared += 1
    assert compared == 18


def test_without_momentum_in_y_the_average_is_the_mean_of_z() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer, visited = ScheduleFreeAdamW([p], lr=0.1, betas=(0.5, 0.9)), []
    for step in range(10):
        set_gradients([p], step)
        optimizer.step()
        visited.append(optimizer.state[p]["z"].clone())
    optimizer.eval()
    torch.testing.assert_close(p.data, torch.stack(visited).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_looking_at_the_averages_does_not_change_the_training(dtype: torch.dtype) -> None:
    runs = []
    for look in (False, True):
        members = members_of(dtype)
        optimizer = ScheduleFreeAdamW(members, lr=0.05)
        for step in range(6):
            walk(optimizer, members, range(step, step + 1))
            if look:
                optimizer.eval()
                optimizer.train()
        runs.append((members, [optimizer.state[p] for p in members]))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert all(a.keys() == b.keys() for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_repeated_switches_change_nothing() -> None:
    members = members_of()
    optimizer = ScheduleFreeAdamW(members, lr=0.05)
    optimizer.eval()  # before the first step x = y = z
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(members, copies(members_of()), strict=True))
    walk(optimizer, members, range(3))
    optimizer.train()
    y = copies(members)
    optimizer.eval()
    x = copies(members)
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(members, x, strict=True)) and optimizer.averaged
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(members, y, strict=True)) and not optimizer.averaged


def test_weights_that_were_changed_in_between_count_as_averages() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([p], lr=0.1)
    walk(optimizer, [p], range(3))
    y = p.detach().clone()
    optimizer.eval()
    p.data[1] = 5.0
    optimizer.train()
    assert p[0] == y[0]
    torch.testing.assert_close(p[1].item(), 5.0 + (1 - 0.9) * (optimizer.state[p]["z"][1].item() - 5.0))


def test_a_step_at_the_averages_is_an_error_and_calls_no_closure() -> None:
    members = members_of()
    optimizer, calls = ScheduleFreeAdamW(members), []
    set_gradients(members, 0)
    optimizer.eval()
    with pytest.raises(FrankensteinError, match=r"schedulefree_adamw: step: .* averaged weights"):
        optimizer.step(lambda: calls.append(1) or 0.0)  # type: ignore[func-returns-value]
    assert not calls and not optimizer.state
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("averaged", [False, True])
def test_the_mode_is_part_of_the_state(averaged: bool) -> None:
    members = members_of()
    optimizer = ScheduleFreeAdamW([{"params": members[:1]}, {"params": members[1:]}], lr=0.05)
    walk(optimizer, members, range(3))
    if averaged:
        optimizer.eval()
    file = io.BytesIO()
    torch.save({"members": copies(members), "optimizer": optimizer.state_dict()}, file)
    optimizer.train()
    walk(optimizer, members, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(t) for t in saved["members"]]
    resumed = ScheduleFreeAdamW([{"params": again[:1]}, {"params": again[1:]}])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.averaged == averaged
    resumed.train()
    walk(resumed, again, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(members, again, strict=True))


def test_a_parameter_that_misses_a_gradient_misses_the_step() -> None:
    runs = []
    for pause in (None, 3):
        members = members_of()
        optimizer, step = ScheduleFreeAdamW(members, lr=0.05, warmup_steps=10, r=1.0), 0
        for tick in range(6 if pause is None else 7):
            set_gradients(members, step)
            if tick == pause:
                members[0].grad = None
            else:
                step += 1
            optimizer.step()
        optimizer.eval()
        runs.append(members[0].detach())
    assert torch.equal(*runs)


def test_a_group_that_is_added_later_has_the_mode_of_the_others() -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = ScheduleFreeAdamW([first], lr=0.1)
    walk(optimizer, [first], range(2))
    optimizer.eval()
    optimizer.add_param_group({"params": [second]})
    assert all(group["averaged"] for group in optimizer.param_groups)
    optimizer.train()
    walk(optimizer, [first, second], range(2, 3))
    assert not torch.equal(second, torch.ones(2))


def test_a_rate_of_zero_at_the_start_of_a_warm_up_moves_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = ScheduleFreeAdamW([p], lr=0.0, weight_decay=0.5)
    walk(optimizer, [p], range(2))
    assert torch.equal(p.data, torch.ones(3))
    optimizer.param_groups[0]["lr"] = 0.1
    walk(optimizer, [p], range(2, 4))
    assert torch.isfinite(p).all() and (p != 1).all()


def test_a_first_beta_of_zero_is_an_error_also_in_a_group() -> None:
    p = nn.Parameter(torch.ones(2))
    for arguments in ({"params": [p], "betas": (0.0, 0.9)}, {"params": [{"params": [p], "betas": (0.0, 0.9)}]}):
        with pytest.raises(
            FrankensteinError, match=r"schedulefree_adamw: betas: found .*: expected a first one above 0"
        ):
            ScheduleFreeAdamW(**arguments)  # type: ignore[arg-type]


def test_a_step_reads_no_value_from_the_device() -> None:
    p = nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = ScheduleFreeAdamW([p], weight_decay=0.1, warmup_steps=3)
    for _ in range(2):
        p.grad = torch.empty_like(p)
        optimizer.step()  # the meta device has no values and raises when asked for one
        optimizer.eval()
        optimizer.train()
    assert optimizer.state[p]["step"] == 2
