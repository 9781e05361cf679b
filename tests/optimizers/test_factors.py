import pytest
import torch
from torch import Tensor

from frankenstein.optimizers import factors
from frankenstein.optimizers.factors import add_gram, along, decompose, whole


@pytest.mark.parametrize("rows", [5, 192, 450], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_lower_triangle_of_a_factor_takes_the_gram_matrix_in(rows: int, dim: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = rows
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    start = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    start = start + start.T
    factor = start.clone()
    add_gram(factor, gradient, dim, keep=0.75, add=0.5)
    names = "abc"
    gram = torch.einsum(f"abc,{names.replace(names[dim], 'x')}->{names[dim]}x", gradient, gradient)
    torch.testing.assert_close(whole(factor), 0.75 * start + 0.5 * gram, rtol=1e-12, atol=1e-12)


def test_what_is_above_the_triangle_never_matters() -> None:
    factor = torch.tensor([[2.0, 99.0], [1.0, 3.0]])
    assert torch.equal(whole(factor), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    ((values, _),) = decompose(torch.linalg.eigh, [factor])
    torch.testing.assert_close(values, torch.linalg.eigvalsh(whole(factor)))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)], ids=str)
def test_a_matrix_is_applied_along_any_dimension(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for dim, size in enumerate(shape):
        matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
        want = torch.stack([matrix @ column for column in x.movedim(dim, -1).reshape(-1, size)])
        want = want.reshape(*(s for i, s in enumerate(shape) if i != dim), size).movedim(-1, dim)
        torch.testing.assert_close(along(x, matrix, dim), want)


def test_decompositions_are_batched_by_size_within_bounds_and_come_back_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, n, generator=generator) for n in (3, 2, 3, 3, 2, 1)]
    matrices = [m + m.T for m in matrices]
    batches: list[tuple[int, ...]] = []

    def recorded(batch: Tensor) -> tuple[Tensor, Tensor]:
        batches.append(tuple(batch.shape))
        return torch.linalg.eigh(batch)

    monkeypatch.setattr(factors, "_BATCH_ELEMENTS", 18)
    found = decompose(recorded, matrices)
    assert batches == [(2, 3, 3), (1, 3, 3), (2, 2, 2), (1, 1, 1)]
    for matrix, (values, vectors) in zip(matrices, found, strict=True):
        torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=1e-5, atol=1e-6)
        assert vectors.is_contiguous() and vectors.untyped_storage().nbytes() == 4 * matrix.numel()
