"""Properties that every registered optimizer has."""

import io

import pytest
import torch
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers import OPTIMIZERS
from frankenstein.optimizers.modes import averaged_weights

every_optimizer = pytest.mark.parametrize("name", list(OPTIMIZERS))


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in [(6, 4), (4, 4), (4,), ()]]


def set_gradients(members: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in members:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def copies(members: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in members]


# What the methods that have a second learning rate, or estimate theirs, need to reach every target at this scale.
ON_THE_QUADRATIC: dict[str, dict[str, float]] = {
    "mars_adamw": {"lr_1d": 0.1, "weight_decay_1d": 0.0},
    "muon": {"fallback_lr_ratio": 1.0},
    "turbo_muon": {"fallback_lr_ratio": 1.0},
    "softmuon": {"fallback_lr_ratio": 1.0},
    "prodigy": {"lr": 1.0, "d0": 1e-2},
    "schedulefree_adamw": {"lr": 0.3},
}


@every_optimizer
def test_it_reaches_the_optimum_of_a_quadratic(name: str) -> None:
    members, targets = parameters(0), copies(parameters(1))
    settings = {"lr": 0.1, "weight_decay": 0.0, **ON_THE_QUADRATIC.get(name, {})}
    optimizer = OPTIMIZERS[name](members, **settings)

    def distance() -> torch.Tensor:
        return sum(((p - t).square().sum() for p, t in zip(members, targets, strict=True)), torch.zeros(()))

    start = distance().item()
    for step in range(300):
        if name != "schedulefree_adamw":  # it wants a constant rate
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (1 - step / 300)
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    with averaged_weights(optimizer):
        assert distance().item() < 1e-3 * start


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_keeps_the_number_type(name: str, dtype: torch.dtype) -> None:
    members = parameters(dtype=dtype)
    before = copies(members)
    first_estimate = {"d0": 0.1} if name == "prodigy" else {}  # its first steps are smaller than bfloat16 can add
    optimizer = OPTIMIZERS[name](members, lr=0.1, **first_estimate)
    for seed in range(3):
        set_gradients(members, seed)
        optimizer.step()
    for p, q in zip(members, before, strict=True):
        assert p.dtype == dtype and torch.isfinite(p).all() and not torch.equal(p, q)


@every_optimizer
def test_parameters_without_a_gradient_are_skipped(name: str) -> None:
    members = parameters()
    before = copies(members)
    optimizer = OPTIMIZERS[name](members, lr=0.1, weight_decay=0.1)
    for seed in range(3):
        set_gradients(members[:2], seed)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(members[2:], before[2:], strict=True))
    assert members[2] not in optimizer.state


@every_optimizer
def test_rows_without_gradient_stay_finite_and_without_decay_stay_where_they_are(name: str) -> None:
    members = parameters()
    before = copies(members)
    optimizer = OPTIMIZERS[name](members, lr=0.1, weight_decay=0.0)
    for seed in range(5):
        set_gradients(members, seed)
        members[0].grad[2:] = 0.0  # type: ignore[index]
        optimizer.step()
    assert torch.isfinite(members[0]).all()
    assert torch.equal(members[0][2:], before[0][2:]) and not torch.equal(members[0][:2], before[0][:2])


@every_optimizer
def test_gradients_are_neither_changed_nor_kept(name: str) -> None:
    members = parameters()
    optimizer = OPTIMIZERS[name](members, weight_decay=0.1)
    for seed in range(2):
        set_gradients(members, seed)
        before = [p.grad.clone() for p in members if p.grad is not None]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(members, before, strict=True))
        kept = {t.data_ptr() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
        assert not kept & {p.grad.data_ptr() for p in members if p.grad is not None}


@every_optimizer
def test_a_run_resumed_from_its_state_is_bit_exact_and_needs_no_pickle(name: str) -> None:
    members = parameters()
    optimizer = OPTIMIZERS[name]([{"params": members[:2], "name": "a"}, {"params": members[2:], "lr": 0.03}], lr=0.1)
    file = io.BytesIO()
    for seed in range(6):
        if seed == 3:
            torch.save({"members": copies(members), "optimizer": optimizer.state_dict()}, file)
        set_gradients(members, seed)
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(t) for t in saved["members"]]
    resumed = OPTIMIZERS[name]([{"params": again[:2], "name": "a"}, {"params": again[2:]}])
    resumed.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        set_gradients(again, seed)
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(again, members, strict=True))


@every_optimizer
def test_groups_are_respected_and_a_zero_rate_does_not_move(name: str) -> None:
    members = parameters()
    before = copies(members)
    groups = [{"params": members[:1], "lr": 0.0, "weight_decay": 0.5}, {"params": members[1:]}]
    optimizer = OPTIMIZERS[name](groups, lr=0.1)
    for seed in range(3):
        set_gradients(members, seed)
        optimizer.step()
    assert torch.equal(members[0], before[0])
    assert not any(torch.equal(p, q) for p, q in zip(members[1:], before[1:], strict=True))


@every_optimizer
def test_two_groups_with_the_same_values_equal_one(name: str) -> None:
    one, two = parameters(), parameters()
    optimizers = [OPTIMIZERS[name](one, lr=0.1), OPTIMIZERS[name]([{"params": two[:2]}, {"params": two[2:]}], lr=0.1)]
    for seed in range(3):
        for members, optimizer in zip((one, two), optimizers, strict=True):
            set_gradients(members, seed)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


@every_optimizer
def test_a_closure_is_called_once_with_gradients_on(name: str) -> None:
    members = parameters()
    optimizer, calls = OPTIMIZERS[name](members, lr=0.1), []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_gradients(members, 0)
        return 4.5

    assert optimizer.step(closure) == 4.5 and calls == [True]


@every_optimizer
@pytest.mark.parametrize(("argument", "value"), [("lr", -0.1), ("weight_decay", -1.0), ("lr", float("nan"))])
def test_senseless_values_are_errors_also_in_a_group(name: str, argument: str, value: float) -> None:
    with pytest.raises(FrankensteinError, match=f"{name}: {argument}: found "):
        OPTIMIZERS[name](parameters(), **{argument: value})
    with pytest.raises(FrankensteinError, match=f"{name}: {argument}: found "):
        OPTIMIZERS[name]([{"params": parameters(), argument: value}])


@every_optimizer
def test_unknown_arguments_are_errors(name: str) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        OPTIMIZERS[name](parameters(), learning_rate=0.1)
    with pytest.raises(FrankensteinError, match="has no argument 'learning_rate'"):
        OPTIMIZERS[name]([{"params": parameters(), "learning_rate": 0.1}])
