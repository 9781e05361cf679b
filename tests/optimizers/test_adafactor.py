from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers import adafactor as module
from frankenstein.optimizers.adafactor import Adafactor

FROZEN = load_file(Path(__file__).with_name("adafactor.safetensors"))  # torch.optim.Adafactor, its defaults
SHAPES = ((7, 5), (3, 4, 6), (8,), ())


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def set_gradients(members: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in members:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def plain(start: Tensor, gradients: list[Tensor], *, lr: float, eps1: float, wd: float, clip: float) -> Tensor:
    """The rule as it is written, with V formed, beta2_decay -0.7 and eps2 0.5."""
    theta, R, C, V = start.clone(), 0, 0, 0
    for t, g in enumerate(gradients, 1):
        beta2 = 1 - t**-0.7
        alpha = max(0.5, theta.square().mean().sqrt().item()) * min(lr, t**-0.5)
        theta = (1 - lr * wd) * theta
        if g.ndim > 1:
            R = beta2 * R + (1 - beta2) * g.square().mean(-1, keepdim=True)
            C = beta2 * C + (1 - beta2) * g.square().mean(-2, keepdim=True)
            V = R * C / R.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            V = beta2 * V + (1 - beta2) * g.square()
        u = g / V.clamp(min=eps1**2).sqrt()
        theta = theta - alpha * u / max(1.0, u.square().mean().sqrt().item() / clip)
    return theta


def test_the_first_step_by_hand() -> None:
    p = nn.Parameter(torch.tensor([3.0, -4.0]))
    p.grad = torch.tensor([0.5, -8.0])
    Adafactor([p], lr=0.1, weight_decay=0.5).step()
    # V = g^2, so u = (1, -1) has RMS 1 and is not clipped; the step is RMS(p) 0.1 = 0.1 sqrt(12.5), the decay 0.05
    torch.testing.assert_close(p.data, torch.tensor([3.0 * 0.95 - 0.353553, -4.0 * 0.95 + 0.353553]))


@pytest.mark.parametrize(
    ("lr", "clip", "eps1"), [(0.02, 1.0, 1e-12), (0.9, 1.0, 0.3), (0.3, 2.0, 1e-3)], ids=["usual", "bounds", "loose"]
)
def test_fifty_steps_equal_the_published_rule_in_double_precision(lr: float, clip: float, eps1: float) -> None:
    members = parameters()
    starts, gradients = [p.detach().clone() for p in members], [[] for _ in members]  # type: ignore[var-annotated]
    arguments = {"lr": lr, "eps1": eps1, "clip_threshold": clip}
    optimizer = Adafactor(members, beta2_decay=-0.7, eps2=0.5, weight_decay=0.03, **arguments)
    for step in range(50):
        set_gradients(members, step)
        for p, kept in zip(members, gradients, strict=True):
            assert p.grad is not None
            p.grad *= 10.0 ** (step % 3 - 1)  # so that clipping is at work
            kept.append(p.grad.clone())
        optimizer.step()
    for p, start, kept in zip(members, starts, gradients, strict=True):
        want = plain(start, kept, lr=lr, eps1=eps1, wd=0.03, clip=clip)
        torch.testing.assert_close(p.data, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eps1", [None, 1e-2, 1e-10])
def test_it_equals_torch(eps1: float | None) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizers = [
        Adafactor(ours, lr=0.05, eps1=eps1, eps2=0.1, clip_threshold=1.2, weight_decay=0.1),
        torch.optim.Adafactor(theirs, lr=0.05, eps=(eps1, 0.1), d=1.2, weight_decay=0.1),
    ]
    for step in range(20):
        for members, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(members, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-5, atol=2e-6)


def test_twelve_steps_equal_frozen_numbers() -> None:
    members = {key: nn.Parameter(FROZEN[f"init/{key}"].clone()) for key in ("emb", "bias", "scalar")}
    optimizer = Adafactor(list(members.values()))
    for step in range(1, 13):
        for key, p in members.items():
            p.grad = FROZEN[f"grad{step - 1:02d}/{key}"].clone()
        optimizer.step()
        for key, p in members.items():
            if f"step{step:02d}/{key}" in FROZEN:
                torch.testing.assert_close(p.data, FROZEN[f"step{step:02d}/{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("eps1", [1e-30, 1e-45])
def test_rows_that_were_never_touched_stay_finite_with_the_papers_eps(eps1: float, dtype: torch.dtype) -> None:
    table = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    vector = nn.Parameter(torch.ones(6, dtype=dtype))
    optimizer = Adafactor([table, vector], lr=0.1, eps1=eps1)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        table.grad, vector.grad = torch.zeros_like(table), torch.zeros_like(vector)
        if step > 0:  # in the first step, nothing at all
            table.grad[:2] = torch.randn(2, 4, generator=generator).to(dtype)
            vector.grad[:2] = 1.0
        optimizer.step()
        assert torch.isfinite(table).all() and torch.isfinite(vector).all()
        assert (table[2:] == 1).all() and (vector[2:] == 1).all()
    assert (table[:2] != 1).all() and (vector[:2] != 1).all()


@pytest.mark.parametrize("gradient", [1e-20, 1e-23, 1e-25, 1e-35])
def test_gradients_too_small_to_square_do_not_push_the_others_aside(gradient: float) -> None:
    moved = []
    for small in (0.0, gradient):
        p = nn.Parameter(torch.ones(4, 4))
        p.grad = torch.full((4, 4), small)
        p.grad[0] = torch.tensor([1.0, -2.0, 3.0, 0.5])
        Adafactor([p], lr=0.1, eps1=1e-30).step()
        moved.append(p.detach()[0] - 1)
    assert torch.isfinite(moved[1]).all()
    assert (moved[1].abs() > 0.5 * moved[0].abs()).all()  # u of the first row has RMS 2; 12 elements of at most 1 join


@pytest.mark.parametrize("shape", [(37, 8), (6, 5, 8), (2, 3, 4, 8), (1, 40)], ids=str)
def test_blocks_for_the_cache_change_nothing_but_the_last_bits(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for block in (1 << 18, 24):
        monkeypatch.setattr(module, "_CPU_BLOCK", block)
        generator = torch.Generator().manual_seed(1)
        members = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in (shape, shape, (3,))]
        optimizer = Adafactor(members, lr=0.1)
        for step in range(5):
            set_gradients(members, step)
            optimizer.step()
        runs.append([p.detach() for p in members])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-13, atol=1e-14)


def test_the_state_of_a_matrix_is_a_row_and_a_column() -> None:
    members = [*parameters(), nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))]
    optimizer = Adafactor(members)
    set_gradients(members, 0)
    optimizer.step()
    shapes = [
        {key: tuple(value.shape) for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        for p in members[:3]
    ]
    assert shapes == [
        {"row": (7, 1), "column": (1, 5)},
        {"row": (3, 4, 1), "column": (3, 1, 6)},
        {"variance": (8,)},
    ]


def test_a_parameter_that_misses_a_gradient_misses_the_step() -> None:
    runs = []
    for pause in (None, 2):
        members = parameters()
        optimizer, step = Adafactor(members, lr=0.5), 0
        for tick in range(5 if pause is None else 6):
            set_gradients(members, step)
            if tick == pause:
                members[0].grad = None
            else:
                step += 1
            optimizer.step()
        runs.append((members[0].detach(), optimizer.state[members[0]]["step"]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] == 5


def test_a_step_reads_no_value_from_the_device() -> None:
    members = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    optimizer = Adafactor(members, weight_decay=0.1)
    for _ in range(2):
        for p in members:
            p.grad = torch.empty_like(p)
        optimizer.step()  # the meta device has no values and raises when asked for one
    assert optimizer.state[members[0]]["step"] == 2


@pytest.mark.parametrize("gradient", [torch.eye(3).to_sparse(), torch.eye(3, dtype=torch.complex64)])
def test_sparse_and_complex_gradients_are_errors(gradient: Tensor) -> None:
    p = nn.Parameter(torch.zeros(3, 3, dtype=gradient.dtype))
    p.grad = gradient
    with pytest.raises(FrankensteinError, match=r"adafactor: gradient: found .*: expected a real and dense one"):
        Adafactor([p]).step()


@pytest.mark.parametrize("wrong", [{"clip_threshold": 0.5}, {"eps1": 0.0}, {"eps2": 0.0}, {"beta2_decay": 0.1}])
def test_senseless_values_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(FrankensteinError, match=f"adafactor: {next(iter(wrong))}: found "):
        Adafactor(parameters(), **wrong)
