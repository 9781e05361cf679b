import copy
import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.softsignum import SoftSignum

FROZEN = load_file(Path(__file__).with_name("softsignum.safetensors"))
NAMES = ("w", "wt", "sq", "emb", "bias", "scalar")


def schedule(x: Tensor, steps: int, sat_eps: float, t_max: float) -> list[float]:
    """The published schedule, in plain Python, without its offset."""
    m = x.median().item()
    s = (x - m).abs().median().item()
    found = []
    for k in range(steps):
        p = k / steps
        q = s * math.tan(math.pi * p / 2) + abs(m)
        for _ in range(10):
            u, v = (q - m) / s, (-q - m) / s
            cdf = (math.atan(u) - math.atan(v)) / math.pi
            pdf = (1 / (1 + u * u) + 1 / (1 + v * v)) / (math.pi * s)
            q = max(0.0, q - (cdf - p) / pdf)
        found.append(min(max(math.atanh(1 - sat_eps) / q, 1.0), t_max) if q > 0 else t_max)
    return found


def test_three_steps_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    optimizer = SoftSignum([p], lr=0.1, momentum=0.5, weight_decay=0.2, sign_steps=2, transition_steps=2)
    p.grad = torch.tensor([0.5, -4.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([1.96 - 0.1, -0.98 + 0.1, 0.49]))
    p.grad = torch.tensor([-0.25, 3.0, 0.0])  # the buffer, a sum: (0, 1, 0)
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([1.86 * 0.98, -0.88 * 0.98 - 0.1, 0.49 * 0.98]))
    # (1, 2, -3): median 1, distances 0, 1, 4: s = 1. The first quantile is 0, so the first temperature is the cap
    p.grad = torch.tensor([1.0, 1.5, -3.0])
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([1.8228 * 0.98 - 0.1, -0.9624 * 0.98 - 0.1, 0.4802 * 0.98 + 0.1]))
    before, second = p.detach().clone(), optimizer.param_groups[0]["schedule"][1].item()
    # |x| is below q with probability 1/2 at q = sqrt(2): atan(q - 1) + atan(q + 1) = pi / 2
    assert second == pytest.approx(math.atanh(1 - 1e-4) / math.sqrt(2), rel=1e-6)
    p.grad = torch.tensor([-0.4, -1.3, 1.5])  # the buffer: (0.1, -0.3, 0)
    optimizer.step()
    torch.testing.assert_close(p.data, 0.98 * before - 0.1 * torch.tanh(second * torch.tensor([0.1, -0.3, 0.0])))


@pytest.mark.parametrize(
    "values",
    [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True, "sat_eps": 1e-2}],
)
def test_fifty_steps_equal_the_published_rule_in_double_precision(values: dict[str, float]) -> None:
    torch.manual_seed(0)
    mu, dampening = values["momentum"], values.get("dampening", 0.0)
    starts = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = SoftSignum(params, lr=0.02, weight_decay=0.1, sign_steps=20, transition_steps=20, t_max=30.0, **values)
    want, buffers = [start.clone() for start in starts], [torch.zeros_like(start) for start in starts]
    temperatures: list[float] = []
    for t in range(1, 51):
        grads = [torch.randn_like(start) for start in starts]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        buffers = [g if t == 1 else mu * b + (1 - dampening) * g for b, g in zip(buffers, grads, strict=True)]
        ahead = [g + mu * b for b, g in zip(buffers, grads, strict=True)]
        us = ahead if values.get("nesterov") else buffers if mu else grads
        if t == 21:
            temperatures = schedule(torch.cat([u.flatten() for u in us]), 20, values.get("sat_eps", 1e-4), 30.0)
        for w, u in zip(want, us, strict=True):
            w.mul_(1 - 0.02 * 0.1).sub_(0.02 * (u.sign() if t <= 20 else (temperatures[min(t - 21, 19)] * u).tanh()))
    assert temperatures[0] == 30.0 and temperatures[-1] < 5.0
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.data, w, rtol=0, atol=1e-7)  # the published offset of 1e-8 in s


def test_it_follows_the_published_code() -> None:
    members = {n: torch.nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in NAMES}
    values = {"lr": 0.002, "dampening": 0.1, "weight_decay": 0.1, "sat_eps": 1e-3}
    optimizer = SoftSignum(list(members.values()), sign_steps=3, transition_steps=9, **values)
    for step in range(7):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{step:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            want = FROZEN.get(f"softsignum_b/step{step + 1:02d}/{n}")
            assert want is None or (p - want).abs().max() < 2.7e-6
    found, want = optimizer.param_groups[0]["schedule"], FROZEN["softsignum_b/schedule"].double()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=0)  # theirs rounds atanh to float32


def test_untouched_rows_stop_the_softening_unless_zeros_are_ignored() -> None:
    torch.manual_seed(0)
    table, rows = torch.zeros(40, 3), torch.randn(10, 3)
    found = {}
    for ignore_zeros in (False, True):
        p = torch.nn.Parameter(table.clone())
        group = {"params": [p], "ignore_zeros": ignore_zeros}
        optimizer = SoftSignum([group], sign_steps=0, transition_steps=4, t_max=1e6)
        p.grad = torch.cat([rows, torch.zeros(30, 3)])
        optimizer.step()
        found[ignore_zeros] = optimizer.param_groups[0]["schedule"].tolist()
        assert not p[10:].any()
    assert found[False] == [1e6] * 4
    alone = torch.nn.Parameter(table[:10].clone())
    optimizer = SoftSignum([alone], sign_steps=0, transition_steps=4, t_max=1e6)
    alone.grad = rows
    optimizer.step()
    assert found[True] == optimizer.param_groups[0]["schedule"].tolist() != found[False]


def test_ignored_zeros_may_be_all_there_is() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.zeros(4)
    optimizer = SoftSignum([p], sign_steps=0, transition_steps=2, t_max=7.0, ignore_zeros=True)
    optimizer.step()
    assert optimizer.param_groups[0]["schedule"].tolist() == [7.0, 7.0] and p.tolist() == [1.0] * 4


def test_building_the_schedule_does_not_touch_the_momentum() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(6, 2), torch.randn(5, 6, 2)
    buffers = []
    for sign_steps in (2, 9000):
        p = torch.nn.Parameter(start.clone())
        optimizer = SoftSignum([p], sign_steps=sign_steps, transition_steps=3)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        buffers.append(optimizer.state[p]["momentum_buffer"])
    assert torch.equal(*buffers)


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_resumed_around_the_switch_is_bit_exact(stop: int) -> None:
    torch.manual_seed(0)
    p, grads = torch.nn.Parameter(torch.randn(5, 4)), torch.randn(8, 5, 4)
    optimizer = SoftSignum([p], lr=0.1, sign_steps=3, transition_steps=4)
    file = io.BytesIO()
    for step, g in enumerate(grads):
        if step == stop:
            torch.save({"p": p.data, "optimizer": optimizer.state_dict()}, file)
        p.grad = g.clone()
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = torch.nn.Parameter(saved["p"])
    resumed = SoftSignum([again])
    resumed.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for g in grads[stop:]:
        again.grad = g.clone()
        resumed.step()
    assert torch.equal(again, p)
    assert torch.equal(resumed.param_groups[0]["schedule"], optimizer.param_groups[0]["schedule"])


def test_without_momentum_it_keeps_no_buffer() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = SoftSignum([p], momentum=0.0)
    p.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step"}


@pytest.mark.parametrize("values", [{"momentum": 0.0}, {"dampening": 0.1}])
def test_nesterov_needs_a_plain_momentum(values: dict[str, float]) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(FrankensteinError, match="nesterov=True needs a momentum above 0 and dampening 0"):
        SoftSignum([p], nesterov=True, **values)
    with pytest.raises(FrankensteinError, match="nesterov=True needs a momentum above 0 and dampening 0"):
        SoftSignum([{"params": [p], "nesterov": True, **values}])
