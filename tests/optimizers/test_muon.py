import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from frankenstein.optimizers.muon import Muon, orthogonalize

FROZEN = load_file(Path(__file__).with_name("muon.safetensors"))
A, B, C = 3.4445, -4.7750, 2.0315


def published_map(U: Tensor, steps: int = 5) -> Tensor:
    X = U.double() / U.double().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = X @ X.mT
        X = A * X + (B * gram + C * gram @ gram) @ X
    return X


def difficult(name: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, columns, generator=generator)
    if name == "rank 3":
        X = X[:, :3] @ torch.randn(3, columns, generator=generator)
    elif name == "decaying":
        X = X * torch.logspace(0, -8, columns)
    elif name == "mostly empty":
        X[3:] = 0
    return X


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def test_two_steps_of_a_diagonal_matrix_by_hand() -> None:
    def after(x: float) -> float:
        for _ in range(5):
            x = A * x + B * x**3 + C * x**5
        return x

    p = torch.nn.Parameter(torch.diag(torch.tensor([1.0, -2.0])))
    optimizer = Muon([p], lr=0.1, momentum=0.5, weight_decay=0.2, ns_dtype="float32")
    p.grad = torch.diag(torch.tensor([3.0, -4.0]))
    optimizer.step()
    first = [0.98 - 0.1 * after(0.6), -1.96 + 0.1 * after(0.8)]
    torch.testing.assert_close(p.data, torch.diag(torch.tensor(first)))
    # B = (1.5, -2), then (1.75, 2); U = (g + B) / 2 = (1.875, 4), of norm 4.41765
    p.grad = torch.diag(torch.tensor([2.0, 6.0]))
    optimizer.step()
    second = [0.98 * first[0] - 0.1 * after(1.875 / 4.4176492), 0.98 * first[1] - 0.1 * after(4 / 4.4176492)]
    torch.testing.assert_close(p.data, torch.diag(torch.tensor(second)))


@pytest.mark.parametrize(("shape", "nesterov"), [((7, 4), True), ((4, 9), False)])
def test_fifty_steps_equal_the_published_rule(shape: tuple[int, int], nesterov: bool) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = Muon([p], lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1, ns_dtype="float32")
    want, buffer = start.clone(), torch.zeros_like(start)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * g
        U = 0.1 * g + 0.9 * buffer if nesterov else buffer
        O = published_map(U) if shape[0] <= shape[1] else published_map(U.T).T
        want = want * (1 - 0.02 * 0.1) - 0.02 * math.sqrt(max(1, shape[0] / shape[1])) * O
    assert p.dtype == torch.float64 == optimizer.state[p]["momentum_buffer"].dtype
    torch.testing.assert_close(p.data, want, rtol=0, atol=2e-6)  # the iteration is float32


@pytest.mark.parametrize(("ns_dtype", "emulated"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_it_follows_torch_muon(ns_dtype: str, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not emulated})
    members = {n: torch.nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in ("w", "emb")}
    optimizer = Muon(list(members.values()), lr=0.02, ns_dtype=ns_dtype)
    for step in range(12):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{step:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            want = FROZEN.get(f"muon_a/step{step + 1:02d}/{n}")
            assert want is None or (p - want).abs().max() < 0.0062  # its iteration is bfloat16


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (40, 160), (520, 520), (513, 800)])
@pytest.mark.parametrize("name", ["random", "rank 3", "decaying", "mostly empty"])
def test_the_map_is_the_published_polynomial_in_float32(name: str, rows: int, columns: int) -> None:
    X = difficult(name, rows, columns)
    found = orthogonalize(X.clone()[None], steps=5, eps=1e-7, exact=True)[0]
    assert error(found, published_map(X)) < 2e-4


@pytest.mark.parametrize(("rows", "columns"), [(40, 160), (128, 512)])
@pytest.mark.parametrize("name", ["random", "rank 3", "decaying", "mostly empty"])
@pytest.mark.parametrize("steps", [5, 7])
def test_on_the_gram_matrix_it_rounds_less_than_a_twentieth_of_bfloat16(
    name: str, rows: int, columns: int, steps: int
) -> None:
    X = difficult(name, rows, columns)[None]
    want = published_map(X, steps)
    ours = error(orthogonalize(X.clone(), steps=steps, eps=1e-7, exact=False), want)
    bfloat16 = error(orthogonalize(X.bfloat16(), steps=steps, eps=1e-7, exact=True), want)
    assert ours < bfloat16 / 20


def test_many_iterations_on_the_gram_matrix_stay_bounded() -> None:
    X = difficult("decaying", 128, 512)[None]
    found = orthogonalize(X.clone(), steps=30, eps=1e-7, exact=False)
    assert torch.linalg.matrix_norm(found, ord=2) < 1.3


def test_singular_values_come_into_the_published_band() -> None:
    X = difficult("random", 48, 96)[None]
    values = torch.linalg.svdvals(orthogonalize(X, steps=5, eps=1e-7, exact=False))
    assert values.min() > 0.6 and values.max() < 1.25


def test_empty_rows_stay_exactly_empty() -> None:
    X = difficult("mostly empty", 520, 800)[None]
    for exact in (True, False):
        found = orthogonalize(X.clone(), steps=5, eps=1e-7, exact=exact)
        assert (found[:, 3:] == 0).all() and (found[:, :3] != 0).any()


@pytest.mark.parametrize(
    ("shape", "adjust_lr_fn", "factor"),
    [((8, 2), "original", 2.0), ((2, 8), "original", 1.0), ((8, 2), "match_rms_adamw", 0.2 * math.sqrt(8))],
)
def test_the_step_is_adjusted_by_shape_and_the_decay_is_not(
    shape: tuple[int, int], adjust_lr_fn: str, factor: float
) -> None:
    torch.manual_seed(0)
    start, g = torch.randn(shape), torch.randn(shape)
    p = torch.nn.Parameter(start.clone())
    p.grad = g.clone()
    Muon([p], lr=0.1, weight_decay=0.5, adjust_lr_fn=adjust_lr_fn, ns_dtype="float32").step()
    O = published_map(g.T).T if shape[0] > shape[1] else published_map(g)
    torch.testing.assert_close(p.data, 0.95 * start - 0.1 * factor * O.float())


def test_ns_eps_bounds_the_norm_from_below() -> None:
    found = orthogonalize(torch.full((1, 1, 1), 0.25), steps=1, eps=0.5, exact=True)
    assert found.item() == pytest.approx(A / 2 + B / 8 + C / 32)
