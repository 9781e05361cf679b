"""What Shampoo and SOAP share: Kronecker factors, their decompositions, and state that keeps its number type."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError

_STRIP = 192  # rows of a factor that are computed together (measured: 96 to 256 are alike)
_BATCH_ELEMENTS = 2**22  # of one batched decomposition: bounds the copies that it makes


def portions(members: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters that are worked on together: all of them on a GPU (few launches), one by one elsewhere (cache)."""
    return [list(members)] if members and members[0].is_cuda else [[p] for p in members]


def dense_gradient(name: str, p: Tensor) -> Tensor:
    """The gradient of a parameter; FrankensteinError, by the optimizer's name, if it is sparse or complex."""
    gradient = p.grad
    if gradient is None or gradient.layout != torch.strided or gradient.is_complex():
        found = "none" if gradient is None else f"{gradient.dtype}, {gradient.layout}, shape {tuple(gradient.shape)}"
        raise FrankensteinError(f"{name}: gradient: found {found}: expected a real and dense one")
    return gradient


def working(tensor: Tensor) -> Tensor:
    """The tensor in the number type of its state: float32 for half precision, else its own."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def add_gram(factor: Tensor, gradient: Tensor, dim: int, *, keep: float, add: float) -> None:
    """factor <- keep factor + add G G^T in place; G is the gradient unfolded along `dim`.

    Only the lower triangle counts: on a CPU most of what is above it is not computed, 0.6 of the time at 768 rows.
    """
    unfolded = gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)
    rows = len(factor)
    strip = _STRIP if factor.device.type == "cpu" else rows
    for start in range(0, rows, strip):
        end = min(start + strip, rows)
        factor[start:end, :end].addmm_(unfolded[start:end], unfolded[:end].mT, beta=keep, alpha=add)


def whole(factor: Tensor) -> Tensor:
    """The symmetric matrix that a factor's lower triangle stands for."""
    return factor.tril() + factor.tril(-1).mT


def along(tensor: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """The tensor with `matrix` applied to every fibre of dimension `dim`: M X for dim 0, X M^T for dim 1."""
    if tensor.ndim == 2:
        return matrix @ tensor if dim == 0 else tensor @ matrix.mT
    return torch.tensordot(matrix, tensor, dims=([1], [dim])).movedim(0, dim)


def decompose(function: Callable[[Tensor], Any], matrices: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """`function` of square matrices, equal sizes in one batch; in float64 where it does not converge in float32.

    Args:
        function: (n, N, N) -> a tensor or a tuple of tensors with n first, e.g. torch.linalg.eigh (which reads the
            lower triangle only).
        matrices: (N, N) each; the sizes may differ.
    Returns: for every matrix its own results, contiguous.
    Raises:
        torch.linalg.LinAlgError: if it does not converge in float64 either, as with NaN or infinity.
    """
    results: list[tuple[Tensor, ...]] = [()] * len(matrices)
    for indices in _batches(matrices):
        batch = torch.stack([matrices[i] for i in indices])
        try:
            found = function(batch)
        except torch.linalg.LinAlgError:
            found = function(batch.double())
        tensors = (found,) if isinstance(found, Tensor) else tuple(found)
        for position, i in enumerate(indices):
            own = (t[position].to(matrices[i].dtype) for t in tensors)
            results[i] = tuple(t.clone(memory_format=torch.contiguous_format) for t in own)
    return results


def _batches(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices of one size, number type and device, bounded in memory."""
    equal: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        equal.setdefault((len(matrix), matrix.dtype, matrix.device), []).append(i)
    for (size, _, _), indices in equal.items():
        count = max(1, _BATCH_ELEMENTS // size**2)
        for start in range(0, len(indices), count):
            yield indices[start : start + count]


def keep_number_types(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Give loaded tensors their saved number type back: torch casts all state to the parameter's on load."""
    numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][key] = value.to(p.device)
