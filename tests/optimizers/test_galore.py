import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers import OPTIMIZERS
from frankenstein.optimizers.contract import CONTRACTS
from frankenstein.optimizers.galore import REFUSED, WRAPPED, GaLore, project, projection
from frankenstein.optimizers.galore_adamw import GaLoreAdamW

SHAPES = ((7, 5), (5, 7), (6, 6), (6, 2), (5,), ())  # the first three are projected at rank 2
every_wrapped = pytest.mark.parametrize("name", WRAPPED)


def parameters(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(members: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in members:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def wrapped(name: str, members: list[nn.Parameter], arguments: dict[str, Any] | None = None, **options: Any) -> GaLore:
    return GaLore(
        name, [{"params": members}], {"lr": 0.05, **(arguments or {})}, **{"rank": 2, "update_interval": 3, **options}
    )


def copies(members: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in members]


def same(one: list[nn.Parameter], two: list[nn.Parameter] | list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_every_method_is_either_wrapped_or_refused() -> None:
    assert {*WRAPPED, *REFUSED} == set(CONTRACTS) and not {*WRAPPED} & {*REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_is_refused_by_name_with_the_reason(name: str) -> None:
    with pytest.raises(FrankensteinError, match=f"use_galore: {name} cannot be wrapped: .*; GaLore wraps sgd_momentum"):
        wrapped(name, parameters(*SHAPES))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(FrankensteinError, match="use_galore: nothing says that mine can be wrapped"):
        wrapped("mine", parameters(*SHAPES))


def test_around_adamw_it_is_galore_adamw_up_to_the_place_of_eps() -> None:
    one, two = parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
    common = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
    outside = GaLore("adamw", [{"params": one}], common, rank=2, update_interval=4, scale=0.3)
    inside = GaLoreAdamW(two, **common, eps=1e-3, rank=2, update_proj_gap=4, scale=0.3)
    for step in range(20):
        for members, optimizer in ((one, outside), (two, inside)):
            set_gradients(members, step)
            if optimizer is outside:  # sqrt(v / c^2) + eps / c = (sqrt(v) + eps) / c
                optimizer.param_groups[0]["eps"] = 1e-3 / math.sqrt(1 - 0.95 ** (step + 1))
            optimizer.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@every_wrapped
def test_a_projected_matrix_moves_by_the_wrapped_methods_step_taken_back(name: str) -> None:
    (p,) = parameters((9, 4))
    rule = {"lr": 0.05, "weight_decay": 0.0}
    optimizer = GaLore(name, [{"params": [p]}], rule, rank=2, update_interval=100, scale=0.5)
    proxy, vectors = nn.Parameter(torch.zeros(9, 2, dtype=torch.float64)), torch.empty(0)
    inner = OPTIMIZERS[name]([proxy], **rule)
    for step in range(6):
        set_gradients([p], step)
        assert p.grad is not None
        if step == 0:
            vectors = projection(p.grad, 2)
        before = p.detach().clone()
        with torch.no_grad():
            proxy.fill_(before.square().mean().sqrt() if name == "adafactor" else 0.0)
        proxy.grad, start = project(p.grad, vectors), proxy.detach().clone()
        inner.step()
        optimizer.step()
        factor = 0.5 * (math.sqrt(9 / 4) / math.sqrt(9 / 2) if "muon" in name else 1.0)
        want = factor * (proxy.detach() - start) @ vectors
        torch.testing.assert_close(p.detach() - before, want, rtol=1e-9, atol=1e-12)
    assert step == 5 and torch.linalg.matrix_rank(want) == 2


@every_wrapped
def test_other_parameters_are_the_wrapped_methods_own(name: str) -> None:
    members, alone = parameters(*SHAPES), parameters(*SHAPES)
    optimizer = wrapped(name, members, {"weight_decay": 0.1})
    inner = OPTIMIZERS[name](alone[3:], lr=0.05, weight_decay=0.1)
    for step in range(5):
        set_gradients(members, step)
        for p, q in zip(members, alone, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        inner.step()
    assert same(members[3:], alone[3:])
    assert [tuple(p.shape) for p in optimizer.projected] == [(7, 5), (5, 7), (6, 6)]


@every_wrapped
def test_it_goes_towards_the_optimum_of_a_quadratic(name: str) -> None:
    members, targets = parameters(*SHAPES), copies(parameters(*SHAPES, seed=1))
    optimizer = wrapped(name, members, {"lr": 0.1, "weight_decay": 0.0}, scale=1.0, update_interval=50)
    distance = lambda: torch.stack([(p - t).square().sum() for p, t in zip(members, targets, strict=True)]).sum()
    start = distance().item()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    assert distance().item() < 0.02 * start


@every_wrapped
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_resumed_from_its_state_is_bit_exact_and_needs_no_pickle(name: str, dtype: torch.dtype) -> None:
    members = parameters(*SHAPES, dtype=dtype)
    optimizer, file = wrapped(name, members, {"weight_decay": 0.1}), io.BytesIO()
    for step in range(8):
        if step == 4:
            torch.save({"members": copies(members), "optimizer": optimizer.state_dict()}, file)
        set_gradients(members, step)
        optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(t) for t in saved["members"]]
    resumed = wrapped(name, again)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(4, 8):
        set_gradients(again, step)
        resumed.param_groups[0]["lr"] = 0.05 / (step + 1)
        resumed.step()
    assert same(members, again) and all(p.dtype == dtype for p in members)


@every_wrapped
def test_a_zero_rate_does_not_move_and_gradients_are_only_read(name: str) -> None:
    members = parameters(*SHAPES)
    before = copies(members)
    groups = [{"params": members[:2], "lr": 0.0, "weight_decay": 0.5}, {"params": members[2:]}]
    optimizer = GaLore(name, groups, {"lr": 0.1}, rank=2, update_interval=2)
    for step in range(4):
        set_gradients(members, step)
        gradients = [p.grad.clone() for p in members if p.grad is not None]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(members, gradients, strict=True))  # type: ignore[arg-type]
    assert same(members[:2], before[:2])
    assert not any(torch.equal(p, q) for p, q in zip(members[2:], before[2:], strict=True))


@every_wrapped
def test_a_matrix_without_a_gradient_is_skipped(name: str) -> None:
    members = parameters(*SHAPES)
    before = copies(members)
    optimizer = wrapped(name, members, {"weight_decay": 0.1})
    for step in range(3):
        set_gradients(members, step)
        members[0].grad = None
        optimizer.step()
    assert torch.equal(members[0], before[0]) and members[0] not in optimizer.state
    assert not torch.equal(members[1], before[1])


@pytest.mark.parametrize(
    ("name", "factor"), [("adamw", 1 - 0.05 * 0.4), ("lion", 1 - 0.05 * 0.4), ("adan", 1 / (1 + 0.05 * 0.4))]
)
def test_the_decay_is_that_of_the_method_on_the_parameter_itself(name: str, factor: float) -> None:
    members = parameters(*SHAPES)
    before = copies(members)
    for p in members:
        p.grad = torch.zeros_like(p)
    wrapped(name, members, {"weight_decay": 0.4}).step()
    for p, q in zip(members, before, strict=True):
        torch.testing.assert_close(p.detach(), q * factor, rtol=1e-12, atol=0)


def test_the_first_step_of_adopt_does_not_decay() -> None:
    members = parameters(*SHAPES)
    before = copies(members)
    optimizer = wrapped("adopt", members, {"weight_decay": 0.4})
    set_gradients(members, 0)
    optimizer.step()
    assert same(members, before)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(members, before, strict=True))


def test_the_l2_term_of_sgd_is_projected_with_the_gradient() -> None:
    (p,) = parameters((7, 5))
    set_gradients([p], 0)
    assert p.grad is not None
    whole = p.grad + 0.4 * p.detach()
    P = projection(whole, 2)
    want = p.detach() - 0.25 * 0.05 * whole @ P.T @ P
    wrapped("sgd_momentum", [p], {"weight_decay": 0.4}).step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-14)


def test_muon_that_matches_adamw_needs_no_rescaling() -> None:
    (p,) = parameters((6, 6))
    before = p.detach().clone()
    optimizer = wrapped("muon", [p], {"adjust_lr_fn": "match_rms_adamw", "ns_dtype": "float32"}, scale=1.0)
    set_gradients([p], 0)
    optimizer.step()
    singular = torch.linalg.svdvals(before - p.detach())
    # two singular values that Newton-Schulz brings near 1, times lr 0.2 sqrt(6)
    assert (singular[2:] < 1e-6).all() and ((singular[:2] / (0.05 * 0.2 * 6**0.5) - 1).abs() < 0.35).all()


def test_a_group_can_be_added() -> None:
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    whole = GaLore("adamw", [{"params": one[:3]}, {"params": one[3:], "lr": 0.02}], {"lr": 0.05}, rank=2)
    grown = GaLore("adamw", [{"params": two[:3]}], {"lr": 0.05}, rank=2)
    grown.add_param_group({"params": two[3:], "lr": 0.02})
    for step in range(3):
        for members, optimizer in ((one, whole), (two, grown)):
            set_gradients(members, step)
            optimizer.step()
    assert same(one, two)


def test_what_is_projected() -> None:
    table, matrix, long, thin, head = parameters((8, 6), (8, 6), (40, 6), (8, 4), (8, 6))
    groups = [
        {"params": [table], "name": "embeddings"},
        {"params": [matrix, long, thin], "name": "attention"},
        {"params": [head], "name": "other", "matrix": False},
    ]
    optimizer = GaLore("muon", groups, {}, rank=4, max_dim=32)
    assert [p is matrix for p in optimizer.projected] == [True]
    assert [g["name"] for g in optimizer.param_groups] == ["embeddings", "attention", "other"]
    assert optimizer.param_groups[1]["params"][0] is matrix and len(optimizer.param_groups[1]["params"]) == 3


def test_to_project_nothing_is_an_error() -> None:
    with pytest.raises(FrankensteinError, match="no matrix has both dimensions above galore_rank=7 and none above"):
        wrapped("adamw", parameters(*SHAPES), rank=7)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("update_interval", True), ("scale", -0.1), ("scale", math.inf), ("max_dim", 1.5)],
)
def test_senseless_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(FrankensteinError, match=f"galore_{option}: found {value}; expected"):
        wrapped("adamw", parameters(*SHAPES), **{option: value})


def test_arguments_are_checked_by_the_wrapped_method() -> None:
    with pytest.raises(FrankensteinError, match="lion: weight_decay: found -1"):
        wrapped("lion", parameters(*SHAPES), {"weight_decay": -1.0})
    with pytest.raises(FrankensteinError, match="lion has no argument 'momentum'"):
        GaLore("lion", [{"params": parameters(*SHAPES), "momentum": 0.9}], {}, rank=2)


def test_a_scheduler_and_values_of_groups_reach_the_wrapped_method() -> None:
    one, two = parameters(*SHAPES), parameters(*SHAPES)
    groups = [{"params": one[:2], "name": "attention", "weight_decay": 0.3}, {"params": one[2:], "lr": 0.02}]
    optimizer = GaLore("lion", groups, {"lr": 0.05}, rank=2, update_interval=3)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    plain = [GaLore("lion", [{"params": two[:2]}], {"weight_decay": 0.3}, rank=2, update_interval=3)]
    plain += [GaLore("lion", [{"params": two[2:]}], {}, rank=2, update_interval=3)]
    for step in range(5):
        for members in (one, two):
            set_gradients(members, step)
        optimizer.step()
        schedule.step()
        for other, base in zip(plain, (0.05, 0.02), strict=True):
            other.param_groups[0]["lr"] = base / (1 + step)
            other.step()
    for p, q in zip(one, two, strict=True):  # groups are computed together: other sizes of products, other last bits
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_state_is_low_rank_and_proxies_are_empty_between_steps() -> None:
    members = parameters((40, 30), (30, 50))
    optimizer = wrapped("adamw", members)
    set_gradients(members, 0)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].shape for p in members] == [(40, 2), (2, 50)]
    assert [optimizer.state[p]["projection"].shape for p in members] == [(2, 30), (30, 2)]
    proxies = [p for group in optimizer.inner.param_groups for p in group["params"]]
    assert all(p.grad is None and not p.any() for p in proxies)


def test_a_closure_is_called_once_with_gradients_on() -> None:
    members = parameters(*SHAPES)
    optimizer, calls = wrapped("lion", members), []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_gradients(members, 0)
        return 4.5

    before = copies(members)
    assert optimizer.step(closure) == 4.5 and calls == [True] and not torch.equal(members[0], before[0])


def test_a_state_of_another_run_is_an_error() -> None:
    members = parameters(*SHAPES)
    optimizer = wrapped("adamw", members)
    with pytest.raises(FrankensteinError, match=r"galore=None; expected \{'optimizer': 'adamw', 'rank': 2"):
        optimizer.load_state_dict(OPTIMIZERS["adamw"](members).state_dict())
    with pytest.raises(FrankensteinError, match="'rank': 3"):
        optimizer.load_state_dict(wrapped("adamw", members, rank=3).state_dict())
