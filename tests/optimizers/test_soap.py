import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.soap import SOAP

FROZEN = load_file(Path(__file__).with_name("soap.safetensors"))
CASES = {
    "soap_a": {"lr": 3e-3},
    "soap_b": {
        "lr": 0.005,
        "betas": (0.9, 0.95),
        "shampoo_beta": 0.9,
        "weight_decay": 0.05,
        "precondition_frequency": 3,
        "max_precond_dim": 16,
    },
}


def double(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def random_like(tensors: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in tensors]


def walk(optimizer: torch.optim.Optimizer, members: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(members, random_like(members, step), strict=True):
            p.grad = g
        optimizer.step()


def turned(x: Tensor, bases: list[Tensor], *, back: bool) -> Tensor:
    for Q in bases:  # the first dimension goes through Q and to the end: after all of them they are in order again
        x = torch.tensordot(x, Q, dims=([0], [1 if back else 0]))
    return x


def published_rule(start: Tensor, grads: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """The paper's algorithm, frequency 4, decay 0.1, factors' decay 0.9: m goes back and forth in every step."""
    theta, g = start.clone(), grads[0]

    def grams(g: Tensor) -> list[Tensor]:
        unfolded = [g.movedim(i, 0).reshape(g.shape[i], -1) for i in range(g.ndim)]
        return [G @ G.T for G in unfolded]

    factors = [0.1 * F for F in grams(g)]
    bases = [torch.linalg.eigh(F).eigenvectors.flip(1) for F in factors]
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(grads[1:], 1):
        rotated = turned(g, bases, back=False)
        m, v = betas[0] * m + (1 - betas[0]) * rotated, betas[1] * v + (1 - betas[1]) * rotated**2
        rate = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
        theta = (theta - rate * turned(m / (v.sqrt() + eps), bases, back=True)) * (1 - lr * 0.1)
        m = turned(m, bases, back=True)
        factors = [0.9 * F + 0.1 * gram for F, gram in zip(factors, grams(g), strict=True)]
        if t % 4 == 0:
            for i, (F, Q) in enumerate(zip(factors, bases, strict=True)):
                order = torch.diag(Q.T @ F @ Q).argsort(descending=True)
                bases[i], v = torch.linalg.qr(F @ Q[:, order]).Q, v.index_select(i, order)
        m = turned(m, bases, back=False)
    return theta


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 4), (2, 2, 3, 2)], ids=str)
def test_thirty_steps_equal_the_published_rule_in_double_precision(shape: tuple[int, ...]) -> None:
    (p,) = double(shape)  # shapes whose first gradient gives every factor full rank: else the basis is arbitrary
    want = published_rule(p.detach(), [random_like([p], s)[0] for s in range(30)], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    optimizer = SOAP(
        [p], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, shampoo_beta=0.9, precondition_frequency=4
    )
    walk(optimizer, [p], range(30))
    torch.testing.assert_close(p.detach(), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_it_reproduces_the_frozen_steps_of_the_reference(case: str) -> None:
    names = ("sq", "bias", "scalar") if case == "soap_a" else ("w", "sq", "bias", "scalar")
    members = {n: nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in names}
    optimizer = SOAP(members.values(), **CASES[case])  # type: ignore[arg-type]
    compared = 0
    for t in range(12):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{t:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            want = FROZEN.get(f"{case}/step{t + 1:02d}/{n}")
            if want is not None:
                torch.testing.assert_close(p.data, want, rtol=0, atol=3e-6)
                compared += 1
    assert compared == 4 * len(names)


def test_the_first_gradient_only_starts_the_bases() -> None:
    members = double((4, 4), (3,), ())
    before = [p.detach().clone() for p in members]
    optimizer = SOAP(members, lr=0.1)
    walk(optimizer, members, range(1))
    assert all(torch.equal(p, q) for p, q in zip(members, before, strict=True))
    assert [optimizer.state[p]["step"] for p in members] == [0, 0, 0]
    basis, factor = optimizer.state[members[0]]["basis_0"], optimizer.state[members[0]]["factor_0"]
    (gradient, *_) = random_like(members, 0)
    torch.testing.assert_close(factor, 0.05 * gradient @ gradient.T)
    eigenvalues = torch.diag(basis.T @ factor @ basis)
    torch.testing.assert_close(basis.T @ factor @ basis, torch.diag(eigenvalues), rtol=0, atol=1e-12)
    assert torch.equal(eigenvalues, eigenvalues.sort(descending=True).values)


def test_it_does_not_depend_on_the_coordinates() -> None:
    (p,) = double((5, 5))
    U, V = (torch.linalg.qr(g).Q for g in random_like([p, p], 77))
    q = nn.Parameter(U @ p.detach() @ V.T)
    one, two = (SOAP([x], lr=0.05, precondition_frequency=3) for x in (p, q))
    for step in range(12):
        (p.grad,) = random_like([p], step)
        q.grad = U @ p.grad @ V.T
        one.step()
        two.step()
    torch.testing.assert_close(q.detach(), U @ p.detach() @ V.T, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (4,), ()], ids=str)
def test_without_factors_it_is_adam_from_the_second_gradient_on(shape: tuple[int, ...]) -> None:
    (p,) = double(shape)
    want, m, v = p.detach().clone(), 0.0, 0.0
    walk(SOAP([p], lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, max_precond_dim=3), [p], range(20))
    for t in range(1, 20):
        (g,) = random_like([p], t)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        want = (want - 0.02 * (1 - 0.95**t) ** 0.5 / (1 - 0.8**t) * m / (v**0.5 + 1e-3)) * (1 - 0.02 * 0.1)
    torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-12)


def test_vectors_have_a_factor_only_on_demand() -> None:
    plain, preconditioned = double((4,)), double((4,))
    for members, chosen in ((plain, False), (preconditioned, True)):
        optimizer = SOAP(members, precondition_1d=chosen)
        walk(optimizer, members, range(3))
        assert ("factor_0" in optimizer.state[members[0]]) == chosen
    assert not torch.allclose(plain[0], preconditioned[0])


def test_bases_turn_when_due_and_stay_orthogonal() -> None:
    (p,) = double((5, 3))
    optimizer, renewed, last = SOAP([p], precondition_frequency=3), [], torch.zeros(5, 5)
    for step in range(9):
        walk(optimizer, [p], range(step, step + 1))
        basis = optimizer.state[p]["basis_0"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
        if not torch.equal(basis, last):
            renewed.append(step)
        last = basis.clone()
    assert renewed == [0, 3, 6]


def test_a_parameter_that_misses_a_gradient_lags_alone() -> None:
    both, alone = double((4, 4), (4, 4)), double((4, 4))
    optimizer, reference = SOAP(both, precondition_frequency=2), SOAP(alone, precondition_frequency=2)
    for step in range(7):
        both[0].grad, both[1].grad = random_like(both, step)
        if step in (0, 2, 3):
            both[0].grad = None
        else:
            alone[0].grad = both[0].grad.clone()
            reference.step()
        optimizer.step()
    assert torch.equal(both[0], alone[0]) and optimizer.state[both[0]]["step"] == 3


def test_what_does_not_converge_in_single_precision_is_done_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, seen = torch.linalg.eigh, []

    def fails_in_single(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return exact(matrix)

    plain, retried = ([nn.Parameter(p.detach().float())] for p in double((4, 4)) * 2)
    walk(SOAP(plain), plain, range(4))
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    walk(SOAP(retried), retried, range(4))
    assert seen == [torch.float32, torch.float64]  # once: both factors are of one size
    torch.testing.assert_close(plain[0], retried[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_single_also_through_a_checkpoint(dtype: torch.dtype) -> None:
    members = [nn.Parameter(p.detach().to(dtype)) for p in double((4, 3), (3,))]
    optimizer = SOAP(members, precondition_frequency=3)
    walk(optimizer, members, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in members]
    resumed = SOAP(again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    tensors = [t for p in again for t in resumed.state[p].values() if isinstance(t, Tensor)]
    assert len(tensors) == 8 and all(t.dtype == torch.float32 for t in tensors)
    walk(optimizer, members, range(5, 9))
    walk(resumed, again, range(5, 9))
    assert all(torch.equal(p, q) and p.dtype == dtype for p, q in zip(members, again, strict=True))


def test_wrong_arguments_and_sparse_gradients_are_named() -> None:
    with pytest.raises(FrankensteinError, match=r"soap: shampoo_beta: found 1\.0"):
        SOAP(double((2, 2)), shampoo_beta=1.0)
    with pytest.raises(FrankensteinError, match="soap: precondition_frequency: found 0"):
        SOAP([{"params": double((2, 2)), "precondition_frequency": 0}])
    (p,) = double((2, 2))
    p.grad = torch.zeros(2, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(FrankensteinError, match=r"soap: gradient: found torch\.float64, torch\.sparse_coo"):
        SOAP([p]).step()
