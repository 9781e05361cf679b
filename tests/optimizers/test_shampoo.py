import io
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import fractional_matrix_power
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.adamw import AdamW
from frankenstein.optimizers.shampoo import Shampoo

FROZEN = load_file(Path(__file__).with_name("shampoo.safetensors"))
SHAPES = ((5, 4), (2, 3, 4), (3,))


def double(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def random_like(tensors: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in tensors]


def walk(optimizer: torch.optim.Optimizer, members: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(members, random_like(members, step), strict=True):
            p.grad = g
        optimizer.step()


def rooted(factors: list[np.ndarray], eps: float, x: np.ndarray) -> np.ndarray:
    """x times (F + eps I)^(-1/2k) along every dimension, by scipy and einsum."""
    for i, F in enumerate(factors):
        root = fractional_matrix_power(F + eps * np.eye(len(F)), -1 / (2 * x.ndim))
        x = np.moveaxis(np.einsum("ij,j...->i...", root, np.moveaxis(x, i, 0)), 0, i)
    return x


def grams(g: np.ndarray) -> list[np.ndarray]:
    unfolded = [np.moveaxis(g, i, 0).reshape(g.shape[i], -1) for i in range(g.ndim)]
    return [G @ G.T for G in unfolded]


def test_the_first_step_of_the_original_form_by_hand() -> None:
    matrix, vector = (nn.Parameter(torch.zeros_like(p)) for p in double((2, 2), (2,)))
    matrix.grad = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    vector.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer = Shampoo([matrix, vector], lr=0.1, betas=(0.0, 1.0), eps=1e-6, bias_correction=False, grafting=None)
    optimizer.step()
    # both factors are diag(9, 1/4): two fourth roots divide each entry by its size; the vector's one root by its norm 5
    torch.testing.assert_close(matrix.data, -0.1 * torch.eye(2, dtype=torch.float64), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(vector.data, vector.grad * -0.02, rtol=1e-5, atol=1e-9)


def test_fifty_steps_equal_the_published_rule_in_double_precision() -> None:
    members = double(*SHAPES)
    optimizer = Shampoo(members, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, graft_beta2=0.9)
    want = [p.detach().numpy().copy() for p in members]
    m, v = [np.zeros_like(x) for x in want], [np.zeros_like(x) for x in want]
    factors = [[np.zeros((d, d)) for d in x.shape] for x in want]
    for t in range(1, 51):
        walk(optimizer, members, range(t, t + 1))
        for i, g in enumerate(g.numpy() for g in random_like(members, t)):
            factors[i] = [0.95 * F + 0.05 * gram for F, gram in zip(factors[i], grams(g), strict=True)]
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            mean = m[i] / (1 - 0.8**t)
            d = rooted([F / (1 - 0.95**t) for F in factors[i]], 1e-4, mean)
            a = mean / (np.sqrt(v[i] / (1 - 0.9**t)) + 1e-8)
            d *= np.linalg.norm(a) / np.linalg.norm(d)
            want[i] = (1 - 0.02 * 0.1) * want[i] - 0.02 * d
    for p, x in zip(members, want, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-11)


def test_twenty_steps_of_the_original_sums_in_double_precision() -> None:
    members = double(*SHAPES)
    optimizer = Shampoo(members, lr=0.5, betas=(0.3, 1.0), eps=1e-2, bias_correction=False, grafting=None)
    want = [p.detach().numpy().copy() for p in members]
    m, factors = [np.zeros_like(x) for x in want], [[np.zeros((d, d)) for d in x.shape] for x in want]
    for t in range(20):
        walk(optimizer, members, range(t, t + 1))
        for i, g in enumerate(g.numpy() for g in random_like(members, t)):
            factors[i] = [F + gram for F, gram in zip(factors[i], grams(g), strict=True)]
            m[i] = 0.3 * m[i] + 0.7 * g
            want[i] = want[i] - 0.5 * rooted(factors[i], 1e-2, m[i])
    for p, x in zip(members, want, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-11)
    assert "exp_avg_sq" not in optimizer.state[members[0]]  # nothing to graft from


def test_it_reproduces_the_frozen_steps_of_the_reference() -> None:
    members = {n: nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in ("w", "sq", "bias", "scalar")}
    optimizer = Shampoo(members.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-5)
    for t in range(12):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{t:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            if f"shampoo_a/step{t + 1:02d}/{n}" in FROZEN:
                torch.testing.assert_close(p.data, FROZEN[f"shampoo_a/step{t + 1:02d}/{n}"], rtol=0, atol=1.6e-6)


def test_the_step_has_the_length_of_adams() -> None:
    members, twins = double((6, 4), (3, 2, 2)), double((6, 4), (3, 2, 2))
    before = [p.detach().clone() for p in members]
    walk(Shampoo(members, lr=0.1, betas=(0.9, 0.99), graft_beta2=0.99), members, range(1))
    walk(AdamW(twins, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0), twins, range(1))
    for p, q, start in zip(members, twins, before, strict=True):
        torch.testing.assert_close((p - start).norm(), (q - start).norm())
        assert not torch.allclose(p, q, atol=1e-3)


def test_with_no_dimension_small_enough_the_direction_is_the_averaged_gradient() -> None:
    (p,) = double((6, 4))
    start, (gradient,) = p.detach().clone(), random_like([p], 0)
    optimizer = Shampoo([p], lr=0.1, grafting=None, max_precond_dim=3)
    walk(optimizer, [p], range(1))
    torch.testing.assert_close(p.detach(), start - 0.1 * gradient)
    assert not any(key.startswith(("factor", "root")) for key in optimizer.state[p])


def test_a_dimension_above_the_largest_is_left_out() -> None:
    (p,) = double((6, 4))
    start, (gradient,) = p.detach().clone(), random_like([p], 0)
    optimizer = Shampoo([p], lr=0.1, betas=(0.0, 1.0), eps=1e-3, grafting=None, max_precond_dim=4)
    walk(optimizer, [p], range(1))
    right = fractional_matrix_power((gradient.T @ gradient).numpy() + 1e-3 * np.eye(4), -1 / 4)
    torch.testing.assert_close(p.detach(), start - 0.1 * gradient @ torch.from_numpy(right))
    assert "factor_0" not in optimizer.state[p]


def test_roots_are_renewed_at_the_first_step_and_at_multiples_of_the_frequency() -> None:
    (p,) = double((4, 4))
    optimizer = Shampoo([p], precondition_frequency=3)
    renewed, last = [], torch.zeros(4, 4)
    for step in range(1, 8):
        walk(optimizer, [p], range(step, step + 1))
        if not torch.equal(optimizer.state[p]["root_0"], last):
            renewed.append(step)
        last = optimizer.state[p]["root_0"].clone()
    assert renewed == [1, 3, 6]


def test_a_scalar_counts_as_a_vector_of_one_element() -> None:
    scalar, vector = double(()), double((1,))
    for members in (scalar, vector):
        walk(Shampoo(members, betas=(0.5, 1.0), grafting=None), members, range(5))
    assert torch.equal(scalar[0], vector[0][0]) and scalar[0].shape == ()


def test_a_gradient_of_zeros_moves_nothing() -> None:
    members = double((3, 2), (2,))
    before = [p.detach().clone() for p in members]
    for p in members:
        p.grad = torch.zeros_like(p)
    Shampoo(members).step()
    assert all(torch.equal(p, q) for p, q in zip(members, before, strict=True))


def test_what_does_not_converge_in_single_precision_is_done_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, seen = torch.linalg.eigh, []

    def fails_in_single(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return exact(matrix)

    plain, retried = ([nn.Parameter(p.detach().float())] for p in double((4, 3)) * 2)
    walk(Shampoo(plain), plain, range(3))
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    walk(Shampoo(retried), retried, range(3))
    assert torch.float64 in seen and retried[0].dtype == torch.float32
    torch.testing.assert_close(plain[0], retried[0], rtol=1e-4, atol=1e-5)
    retried[0].grad = torch.full((4, 3), torch.nan)
    with pytest.raises(torch.linalg.LinAlgError):
        Shampoo(retried).step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_single_also_through_a_checkpoint(dtype: torch.dtype) -> None:
    members = [nn.Parameter(p.detach().to(dtype)) for p in double((4, 3), (3,))]
    optimizer = Shampoo(members, precondition_frequency=3)
    walk(optimizer, members, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in members]
    resumed = Shampoo(again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    tensors = [t for p in again for t in resumed.state[p].values() if isinstance(t, Tensor)]
    assert len(tensors) == 10 and all(t.dtype == torch.float32 for t in tensors)
    walk(optimizer, members, range(4, 8))
    walk(resumed, again, range(4, 8))
    assert all(torch.equal(p, q) and p.dtype == dtype for p, q in zip(members, again, strict=True))


def test_wrong_arguments_and_sparse_gradients_are_named() -> None:
    with pytest.raises(FrankensteinError, match="shampoo: grafting: found 'sgd'"):
        Shampoo(double((2, 2)), grafting="sgd")
    with pytest.raises(FrankensteinError, match=r"shampoo: betas: found \(1.0, 0.9\)"):
        Shampoo(double((2, 2)), betas=(1.0, 0.9))
    (p,) = double((2, 2))
    p.grad = torch.zeros(2, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(FrankensteinError, match=r"shampoo: gradient: found torch\.float64, torch\.sparse_coo"):
        Shampoo([p]).step()
