import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from frankenstein.optimizers.muon import Muon
from frankenstein.optimizers.softmuon import SoftMuon, singular_values, soften
from frankenstein.optimizers.temperature import temperatures

FROZEN = load_file(Path(__file__).with_name("softmuon.safetensors"))
NAMES = ("w", "wt", "sq", "emb")


def exact_map(U: Tensor, T: float) -> Tensor:
    left, sigma, right = torch.linalg.svd(U.double(), full_matrices=False)
    return left @ torch.diag_embed(sigma / (sigma.square() + T**-2).sqrt()) @ right


def published_iteration(U: Tensor, T: float, steps: int) -> Tensor:
    X, one = U.double(), torch.eye(U.shape[-2], dtype=torch.float64)
    A = X @ X.mT + one / T**2
    size = A.norm(dim=(-2, -1), keepdim=True)
    Y, Z = A / size, one.expand_as(A)
    for _ in range(steps):
        W = (3 * one - Z @ Y) / 2
        Y, Z = Y @ W, W @ Z
    return Z @ X / size.sqrt()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (24, 40), (16, 16), (520, 530)])
@pytest.mark.parametrize("T", [1e9, 30.0, 0.01])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_map_is_the_published_iteration(rows: int, columns: int, T: float, steps: int) -> None:
    U = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0))
    found, want = soften(U.clone(), T, steps=steps), published_iteration(U, T, steps)
    assert (found - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.parametrize("T", [1e9, 1.0, 0.1, 1e-3])
def test_with_enough_steps_singular_values_go_through_the_soft_sign(T: float) -> None:
    U = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(0))
    want = exact_map(U, T)
    assert (soften(U.clone(), T, steps=12) - want).abs().max() < 1e-5 * want.abs().max()


def test_its_limits_are_the_polar_factor_and_the_gradient() -> None:
    U = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0))
    hot, cold = soften(U.clone(), 1e9, steps=20), soften(U.clone(), 1e-4, steps=20)
    torch.testing.assert_close(hot @ hot.mT, torch.eye(5)[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(cold, 1e-4 * U, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-12, 1e15])
@pytest.mark.parametrize("T", [1e30, 1e9, 1.0])
def test_no_size_of_the_matrix_or_the_temperature_leaves_the_range(size: float, T: float) -> None:
    U = size * torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(0))
    found = soften(U.clone(), T, steps=5)
    want = published_iteration(U, T, 5) if size else torch.zeros(1, 4, 7)
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-4, atol=1e-30)


def test_singular_values_are_those_of_the_gradients_of_every_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(s)) for s in [(6, 4), (4, 6), (6, 4), (3, 2, 2)]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    params[2].grad = params[0].grad[:, :1] @ torch.randn(1, 4, generator=generator)  # type: ignore[index]
    want = torch.cat([torch.linalg.svdvals(p.grad.flatten(1).double()) for p in params if p.grad is not None])
    found = singular_values(params)
    torch.testing.assert_close(found.sort().values, want.sort().values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("values", [{}, {"sign_steps": 40, "transition_steps": 5}, {"transition_steps": 5}])
def test_before_the_switch_it_is_muon(values: dict[str, int]) -> None:
    ends = []
    for cls, own in ((SoftMuon, values), (Muon, {})):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(6, 4), (4, 6), (5,)]]
        optimizer = cls(params, weight_decay=0.1, **own)  # type: ignore[arg-type]
        for _ in range(10):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_fifty_steps_equal_the_published_rule() -> None:
    torch.manual_seed(0)
    shapes, values = [(7, 4), (4, 6)], {"sat_eps": 1e-2, "t_max": 1e6}
    starts = [torch.randn(s, dtype=torch.float64) for s in shapes]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = SoftMuon(
        params, lr=0.02, momentum=0.9, weight_decay=0.1, sign_steps=0, transition_steps=30, ns_dtype="float32", **values
    )
    want, buffers = [s.clone() for s in starts], [torch.zeros_like(s) for s in starts]
    schedule: list[float] = []
    for t in range(50):
        grads = [torch.randn_like(s) / 100 for s in starts]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        if t == 0:
            sigma = torch.cat([torch.linalg.svdvals(g) for g in grads])
            saturation = 0.99 / math.sqrt(1 - 0.99**2)
            schedule = temperatures(sigma, saturation, steps=30, newton_steps=10, t_max=1e6).tolist()
        for w, b, g in zip(want, buffers, grads, strict=True):
            b.lerp_(g, 0.1)
            U, T, tall = 0.1 * g + 0.9 * b, schedule[min(t, 29)], g.shape[0] > g.shape[1]
            O = published_iteration(U.T, T, 5).T if tall else published_iteration(U, T, 5)
            w.mul_(1 - 0.02 * 0.1).sub_(0.02 * math.sqrt(max(1, g.shape[0] / g.shape[1])) * O)
    assert schedule[0] == 1e6 and 10 < schedule[-1] < 1e3
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.data, w, rtol=0, atol=2e-6)  # the iteration is float32


@pytest.mark.parametrize("emulated", [True, False])
def test_it_follows_the_published_code(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not emulated})
    members = {n: torch.nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in NAMES}
    optimizer = SoftMuon(list(members.values()), sign_steps=6, transition_steps=6)
    for step in range(8):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{step:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            want = FROZEN.get(f"softmuon_a/step{step + 1:02d}/{n}")
            assert want is None or (p - want).abs().max() < 0.0091  # its iteration is bfloat16
    found, want = optimizer.param_groups[0]["schedule"], FROZEN["softmuon_a/schedule"].double()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=0)


def test_vectors_and_groups_without_matrices_do_not_soften() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(4, 3), (5,), (6, 2)]]
    groups = [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:], "matrix": False}]
    optimizer = SoftMuon(groups, sign_steps=1, transition_steps=3)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    schedules = [group["schedule"] for group in optimizer.param_groups]
    assert schedules[0] is not None and schedules[1] is None and schedules[2] is None


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_resumed_around_the_switch_is_bit_exact(stop: int) -> None:
    torch.manual_seed(0)
    p, grads = torch.nn.Parameter(torch.randn(5, 4)), torch.randn(8, 5, 4)
    optimizer = SoftMuon([p], lr=0.1, sign_steps=3, transition_steps=4)
    file = io.BytesIO()
    for step, g in enumerate(grads):
        if step == stop:
            torch.save({"p": p.data, "optimizer": optimizer.state_dict()}, file)
        p.grad = g.clone()
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = torch.nn.Parameter(saved["p"])
    resumed = SoftMuon([again])
    resumed.load_state_dict(saved["optimizer"])
    for g in grads[stop:]:
        again.grad = g.clone()
        resumed.step()
    assert torch.equal(again, p)
