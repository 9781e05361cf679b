import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.prodigy import Prodigy

FROZEN = load_file(Path(__file__).with_name("prodigy.safetensors"))  # prodigyopt at 3efb213e, its defaults
FROZEN_D = [1e-06, 1e-06, 1e-06, 1.4044845192893673e-06, 1.6957229275164607e-06, 1.6957229275164607e-06]
SHAPES = ((5, 3), (2, 3, 4), (4,), ())


def random(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random(0)]


TARGETS = random(1)


def gradients(at: list[Tensor], step: int) -> list[Tensor]:
    """Of half the squared distance to the targets, with noise: d grows in many steps, not in all."""
    noise = random(100 + step)
    return [p - target + 0.5 * n for p, target, n in zip(at, TARGETS, noise, strict=True)]


def walk(optimizer: Prodigy, members: list[nn.Parameter], steps: range) -> list[float]:
    """d after every step."""
    found = []
    for step in steps:
        for p, g in zip(members, gradients([p.detach() for p in members], step), strict=True):
            p.grad = g
        optimizer.step()
        found.append(float(optimizer.param_groups[0]["d"]))
    return found


class Plain:
    """The rule as it is written, on numbers and whole tensors; `lrs` has one a parameter."""

    def __init__(
        self, start: list[Tensor], *, betas: tuple[float, float], eps: float, wd: float, **settings: Any
    ) -> None:
        self.theta, self.start = [t.clone() for t in start], start
        self.m, self.v, self.s = ([torch.zeros_like(t) for t in start] for _ in range(3))
        (self.b1, self.b2), self.eps, self.wd, self.settings = betas, eps, wd, settings
        self.d = self.d_max = settings.get("d0", 1e-6)
        self.r, self.t = 0.0, 0

    def step(self, grads: list[Tensor], lrs: list[float]) -> None:
        self.t += 1
        b1, b2, b3, d, d0 = self.b1, self.b2, math.sqrt(self.b2), self.d, self.settings.get("d0", 1e-6)
        c = math.sqrt(1 - b2**self.t) / (1 - b1**self.t) if self.settings.get("use_bias_correction") else 1.0
        dlr = d * max(lrs) * c
        inner = sum((g * (s - p)).sum().item() for g, s, p in zip(grads, self.start, self.theta, strict=True))
        self.r = b3 * self.r + d / d0 * dlr * inner
        weight = d / d0 * (d if self.settings.get("safeguard_warmup") else dlr)
        for i, g in enumerate(grads):
            self.m[i] = b1 * self.m[i] + (1 - b1) * d * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * d * d * g * g
            self.s[i] = b3 * self.s[i] + weight * g
        estimate = self.settings.get("d_coef", 1.0) * self.r / sum(s.abs().sum().item() for s in self.s)
        new = max(d, estimate) if d == d0 else d
        self.d_max = max(self.d_max, estimate)
        self.d = min(self.d_max, new * self.settings.get("growth_rate", math.inf))
        for i, lr in enumerate(lrs):
            own = d * lr * c
            decayed = self.theta[i] - self.wd * own * self.theta[i]
            self.theta[i] = decayed - own * self.m[i] / (self.v[i].sqrt() + self.d * self.eps)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"d0": 1e-3, "d_coef": 2.0, "growth_rate": 1.3},
        {"d0": 1e-4, "use_bias_correction": True},
        {"d0": 1e-2, "safeguard_warmup": True, "use_bias_correction": True},
    ],
    ids=str,
)
def test_fifty_steps_equal_the_published_rule_in_double_precision(settings: dict[str, Any]) -> None:
    members = parameters()
    optimizer = Prodigy(members, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, **settings)
    plain = Plain(random(0), betas=(0.8, 0.95), eps=1e-3, wd=0.1, **settings)
    for step in range(50):
        lr = optimizer.param_groups[0]["lr"] = min(1.0, 0.2 + step / 10)
        plain.step(gradients(plain.theta, step), [lr] * len(members))
        (d,) = walk(optimizer, members, range(step, step + 1))
        assert d == pytest.approx(plain.d, rel=1e-9)
    assert plain.d > 20 * settings.get("d0", 1e-6)
    for p, want in zip(members, plain.theta, strict=True):
        torch.testing.assert_close(p.data, want, rtol=1e-7, atol=1e-8)


def test_the_first_two_steps_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    optimizer = Prodigy([p], betas=(0.5, 0.75), d0=0.1, eps=1e-12)
    p.grad = torch.tensor([2.0, -4.0], dtype=torch.float64)
    optimizer.step()  # r = 0, so d stays; m = 0.05 g, sqrt(v) = 0.5 0.1 |g|: a step of 0.1 0.05 / 0.05 each
    torch.testing.assert_close(p.data, torch.tensor([0.9, -0.9], dtype=torch.float64))
    assert float(optimizer.param_groups[0]["d"]) == 0.1
    p.grad = torch.tensor([2.0, -4.0], dtype=torch.float64)
    optimizer.step()
    # r = 0.1 (2 0.1 + 4 0.1) = 0.06; s = 0.1 (1 + sqrt(3)/2) (2, -4), so dhat = 0.06 / (0.6 1.8660254)
    assert float(optimizer.param_groups[0]["d"]) == pytest.approx(0.1)  # 0.0536 is less than the first estimate
    m, v = 0.1 * 0.75, 0.01 * 0.25 * 1.75  # of |g| = 1, with the old d
    move = 0.1 * m / math.sqrt(v)
    torch.testing.assert_close(p.data, torch.tensor([0.9 - move, -0.9 + move], dtype=torch.float64))
    assert float(optimizer.param_groups[0]["d_max"]) == 0.1
    assert float(optimizer.param_groups[0]["r"]) == pytest.approx(0.06)


def test_six_steps_equal_frozen_numbers_of_parameters_and_of_d() -> None:
    members = {key: nn.Parameter(FROZEN[f"init/{key}"].clone()) for key in ("w", "wt", "sq", "emb", "bias", "scalar")}
    optimizer = Prodigy(list(members.values()))
    for step in range(1, 7):
        for key, p in members.items():
            p.grad = FROZEN[f"grad{step - 1:02d}/{key}"].clone()
        optimizer.step()
        assert float(optimizer.param_groups[0]["d"]) == pytest.approx(FROZEN_D[step - 1], rel=1e-4)
        for key, p in members.items():
            if f"step{step:02d}/{key}" in FROZEN:
                torch.testing.assert_close(p.data, FROZEN[f"step{step:02d}/{key}"], rtol=1e-7, atol=1e-7)


def test_groups_share_d_and_step_with_their_own_rates() -> None:
    members = parameters()
    groups = [{"params": members[:2], "lr": 0.25}, {"params": members[2:]}]
    optimizer = Prodigy(groups, lr=0.5, betas=(0.8, 0.95), d0=1e-2, eps=1e-3)
    plain = Plain(random(0), betas=(0.8, 0.95), eps=1e-3, wd=0.0, d0=1e-2)
    for step in range(20):
        plain.step(gradients(plain.theta, step), [0.25, 0.25, 0.5, 0.5])
    walk(optimizer, members, range(20))
    first, second = optimizer.param_groups
    assert float(first["d"]) == float(second["d"]) == pytest.approx(plain.d, rel=1e-9) and plain.d > 0.1
    for p, want in zip(members, plain.theta, strict=True):
        torch.testing.assert_close(p.data, want, rtol=1e-8, atol=1e-10)


def test_d_does_not_depend_on_how_parameters_are_grouped_or_ordered() -> None:
    runs = []
    for order in ([[0, 1, 2, 3]], [[3, 1], [0], [2]]):
        members = parameters()
        optimizer = Prodigy([{"params": [members[i] for i in group]} for group in order])
        runs.append((walk(optimizer, members, range(30)), members))
    assert runs[0][0] == runs[1][0] and runs[0][0][-1] > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))


def test_tensors_that_are_cut_up_and_threads_change_nothing_but_the_last_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 300_001, generator=generator, dtype=torch.float64)
    plain = Plain([start], betas=(0.9, 0.999), eps=1e-3, wd=0.01)
    for _ in range(12):
        plain.step([plain.theta[0] - target], [1.0])
    before = torch.get_num_threads()
    for threads in (1, 3):
        p = nn.Parameter(start.clone())
        optimizer = Prodigy([p], eps=1e-3, weight_decay=0.01)
        try:
            torch.set_num_threads(threads)
            for _ in range(12):
                p.grad = p.detach() - target
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        assert float(optimizer.param_groups[0]["d"]) == pytest.approx(plain.d, rel=1e-9) and plain.d > 1e-5
        torch.testing.assert_close(p.data, plain.theta[0], rtol=1e-9, atol=1e-10)


def test_a_group_with_a_rate_of_zero_takes_no_part() -> None:
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float64))
    runs = []
    for extra in ([], [{"params": [frozen], "lr": 0.0, "weight_decay": 0.5}]):
        members = parameters()
        optimizer = Prodigy([{"params": members}, *extra])
        frozen.grad = torch.full_like(frozen, 1e3)
        runs.append((walk(optimizer, members, range(20)), members))
    assert runs[0][0] == runs[1][0] and torch.equal(frozen.data, torch.ones(3, dtype=torch.float64))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))
    assert frozen not in optimizer.state
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = (float(optimizer.param_groups[0]["d"]), optimizer.state[members[0]]["step"])
    walk(optimizer, members, range(20, 22))
    assert before == (float(optimizer.param_groups[0]["d"]), optimizer.state[members[0]]["step"])


def test_a_missing_gradient_does_not_inflate_the_estimate() -> None:
    members = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = Prodigy(members, betas=(0.5, 0.75), d0=0.1)
    for p, g in zip(members, (1.0, 3.0), strict=True):
        p.grad = torch.full_like(p, g)
    optimizer.step()  # s = 0.1 g
    members[1].grad = None
    optimizer.step()
    s = [0.1 * (math.sqrt(0.75) + 1), 0.1 * 3.0]  # one went on, one did not
    moved = 0.1 * 0.5 / math.sqrt(0.25)
    r = 0.1 * moved
    group = optimizer.param_groups[0]
    assert float(group["r"]) == pytest.approx(r)
    assert [optimizer.state[p]["s"].item() for p in members] == pytest.approx(s)
    assert optimizer.state[members[1]]["step"] == 1 and members[1].item() == pytest.approx(-moved)
    group["d_coef"] = 100.0  # now the estimate is what decides
    members[0].grad = torch.zeros_like(members[0])
    optimizer.step()
    decayed = math.sqrt(0.75)
    want = 100 * decayed * r / (decayed * s[0] + s[1])
    assert float(group["d"]) == pytest.approx(want) and want > 0.1


def test_without_any_gradient_so_far_nothing_moves() -> None:
    members = parameters()
    optimizer = Prodigy(members)
    optimizer.step()
    assert not optimizer.state
    for p in members:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(members, random(0), strict=True))
    assert float(optimizer.param_groups[0]["d"]) == 1e-6
    assert walk(optimizer, members, range(20))[-1] > 1e-5


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_a_run_with_a_grown_d_goes_on_exactly(how: str) -> None:
    members = parameters()
    optimizer = Prodigy(members, use_bias_correction=True)
    walk(optimizer, members, range(25))
    again, resumed = copy.deepcopy((members, optimizer))
    if how == "state_dict":
        resumed = Prodigy(again)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert walk(optimizer, members, range(25, 40)) == walk(resumed, again, range(25, 40))
    assert all(torch.equal(p, q) for p, q in zip(members, again, strict=True))


@pytest.mark.parametrize("name", ["d0", "d_coef", "growth_rate"])
def test_what_belongs_to_the_common_estimate_is_the_same_in_all_groups(name: str) -> None:
    members = parameters()
    optimizer = Prodigy([{"params": members[:1], name: 2.0}, {"params": members[1:2], name: 2.0}])
    with pytest.raises(FrankensteinError, match=rf"prodigy: {name}: found 3.0: expected 2.0 in all groups"):
        optimizer.add_param_group({"params": members[2:], name: 3.0})
    assert len(optimizer.param_groups) == 2


def test_a_group_that_is_added_later_takes_part_in_the_present_estimate() -> None:
    members = parameters()
    optimizer = Prodigy(members[:3])
    walk(optimizer, members, range(20))
    grown = float(optimizer.param_groups[0]["d"])
    optimizer.add_param_group({"params": members[3:]})
    assert float(optimizer.param_groups[1]["d"]) == grown > 1e-6
    before = members[3].detach().clone()
    walk(optimizer, members, range(20, 21))
    assert (members[3] - before).abs() > 0.1 * grown


@pytest.mark.parametrize("arguments", [{"use_bias_correction": True, "weight_decay": 0.1}, {"safeguard_warmup": True}])
def test_a_step_reads_no_value_from_the_device(arguments: dict[str, Any]) -> None:
    members = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    optimizer = Prodigy([{"params": members[:2]}, {"params": members[2:]}], **arguments)
    for step in range(3):
        for i, p in enumerate(members):
            p.grad = None if i == step else torch.empty_like(p)
        optimizer.step()  # the meta device has no values and raises when asked for one
    assert optimizer.state[members[3]]["step"] == 3 and optimizer.param_groups[1]["d"].device.type == "meta"


def test_an_infinite_growth_rate_is_allowed_and_other_infinities_are_not() -> None:
    Prodigy([{"params": parameters(), "growth_rate": math.inf}])
    with pytest.raises(FrankensteinError, match=r"prodigy: d_coef: found inf: expected a finite number"):
        Prodigy(parameters(), d_coef=math.inf)
    with pytest.raises(FrankensteinError, match=r"prodigy: growth_rate: found 0.5"):
        Prodigy(parameters(), growth_rate=0.5)
