import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.turbo_muon import TurboMuon, orthogonalize

FROZEN = load_file(Path(__file__).with_name("turbo_muon.safetensors"))
TRIPLES = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def published_map(U: Tensor, steps: int, eps: float = 1e-6) -> Tensor:
    X = U.double()
    X = X / (X @ X.mT).abs().sum(-1, keepdim=True).clamp_min(eps).sqrt()
    for a, b, c in TRIPLES[5 - steps :]:
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_the_first_step_of_a_diagonal_matrix_by_hand(steps: int) -> None:
    x = 1.0  # rows that are orthogonal are scaled to length 1, whatever they were
    for a, b, c in TRIPLES[5 - steps :]:
        x = a * x + b * x**3 + c * x**5
    p = torch.nn.Parameter(torch.diag(torch.tensor([1.0, 2.0])))
    p.grad = torch.diag(torch.tensor([0.01, -300.0]))
    TurboMuon([p], lr=0.1, momentum=0.0, weight_decay=0.2, ns_steps=steps, ns_dtype="float32").step()
    torch.testing.assert_close(p.data, torch.diag(torch.tensor([0.98 - 0.1 * x, 1.96 + 0.1 * x])))


@pytest.mark.parametrize("shape", [(7, 4), (4, 9)])
def test_fifty_steps_equal_the_published_rule(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = TurboMuon([p], lr=0.02, momentum=0.9, weight_decay=0.1, ns_dtype="float32")
    want, buffer = start.clone(), torch.zeros_like(start)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * g
        U = 0.1 * g + 0.9 * buffer
        O = published_map(U, 4) if shape[0] <= shape[1] else published_map(U.T, 4).T
        want = want * (1 - 0.02 * 0.1) - 0.02 * math.sqrt(max(1, shape[0] / shape[1])) * O
    torch.testing.assert_close(p.data, want, rtol=0, atol=2e-6)  # the iteration is float32


@pytest.mark.parametrize(
    ("case", "ns_dtype", "weight_decay", "atol"),
    [("turbo_muon_a", "bfloat16", 0.0, 0.0046), ("turbo_muon_fp32", "float32", 0.1, 1.6e-6)],
)
def test_it_follows_the_published_code(case: str, ns_dtype: str, weight_decay: float, atol: float) -> None:
    members = {n: torch.nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in ("w", "emb")}
    optimizer = TurboMuon(list(members.values()), lr=0.02, ns_dtype=ns_dtype, weight_decay=weight_decay)
    for step in range(8):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{step:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            want = FROZEN.get(f"{case}/step{step + 1:02d}/{n}")
            assert want is None or (p - want).abs().max() < atol


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rank", [2, 40])
def test_the_map_is_the_published_one_and_its_singular_values_come_close_to_1(exact: bool, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 160, generator=generator)
    found, want = orthogonalize(U.clone()[None], steps=4, eps=1e-6, exact=exact)[0], published_map(U, 4)
    assert (found - want).abs().max() < 1e-4 * want.abs().max()
    values = torch.linalg.svdvals(found)[:2]
    assert values.min() > 0.9 and values.max() < 1.1


def test_a_matrix_with_rows_below_sqrt_eps_gives_a_small_step() -> None:
    U = torch.full((1, 1, 4), 5e-5)  # length 1e-4, divided by sqrt(1e-6)
    found = orthogonalize(U.clone(), steps=1, eps=1e-6, exact=True)
    assert found.norm().item() == pytest.approx(0.1 * 2.8366 - 0.001 * 3.0525, rel=1e-3)


def test_more_iterations_than_triples_are_an_error() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(FrankensteinError, match="turbo_muon: ns_steps: found 6: expected at most 5"):
        TurboMuon([p], ns_steps=6)
    with pytest.raises(FrankensteinError, match="turbo_muon: ns_steps: found 6: expected at most 5"):
        TurboMuon([{"params": [p], "ns_steps": 6}])
