"""Adafactor: Adam's second moment, kept as one row and one column of averages for every matrix.

    b2_t = 1 - t^beta2_decay                    R, C <- averages of the row and column means of g^2 by b2_t
    V = R C / max(mean(R), eps1)                fewer than 2 dimensions: V <- average of g^2
    u = g / sqrt(max(V, eps1^2));  u <- u / max(1, RMS(u) / clip_threshold)
    alpha = max(eps2, RMS(theta)) min(lr, 1/sqrt(t));  theta <- (1 - lr wd) theta;  theta <- theta - alpha u
Source: Shazeer & Stern 2018, algorithms 4 and 5, https://arxiv.org/abs/1804.04235, with torch.optim.Adafactor's place
of eps1 (the paper adds it to g^2) and no first moment. Where we differ from torch: V is never formed, so that eps1^2
cannot underflow; sqrt(V) is bounded below by max(eps1, the root of the number type's smallest normal number), and the
paper's eps1 = 1e-30 is safe for rows without gradient, where torch gives NaN.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS, Method

_CPU_BLOCK = 1 << 18  # elements that stay in a core's cache from one operation to the next
_DEVICE_BATCH = 1 << 26  # elements that are updated together elsewhere; bounds the memory of their directions


@OPTIMIZERS.register("adafactor")
class Adafactor(Method):
    """Factored second moments over the last two dimensions, clipped updates, steps relative to the parameter's RMS.

    State: `row` (..., m, 1) and `column` (..., 1, n) for a parameter (..., m, n), `variance` for one with fewer than 2
    dimensions, `step`.
    Args:
        lr: upper bound of the relative step 1/sqrt(t), and factor of the weight decay.
        beta2_decay: <= 0.
        eps1: lower bound of sqrt(V) and of mean(R); None is the number type's eps.
        eps2: lower bound of the parameter's RMS.
        clip_threshold: largest RMS of u, >= 1.
    Raises:
        FrankensteinError: for an unknown argument or a senseless value, by its name.
    """

    name = "adafactor"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.01,
        beta2_decay: float = -0.8,
        eps1: float | None = None,
        eps2: float = 1e-3,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        arguments = {"lr": lr, "beta2_decay": beta2_decay, "eps1": eps1, "eps2": eps2}
        super().__init__(params, {**arguments, "clip_threshold": clip_threshold, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        for p in members:
            grad = p.grad
            if grad is None or grad.layout != torch.strided or grad.is_complex():
                found = "none" if grad is None else f"{grad.dtype}, {grad.layout}, shape {tuple(grad.shape)}"
                raise FrankensteinError(f"adafactor: gradient: found {found}: expected a real and dense one")
            if not self.state[p]:
                self.state[p] = {"step": 0, **_zeros(p)}
            self.state[p]["step"] += 1
        for batch in self._batches([p for p in members if p.numel() > 0]):
            self._move(group, batch)

    def _batches(self, members: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Members that share step, device, number type and form of the second moment, a bounded number of elements."""
        alike: dict[Any, list[nn.Parameter]] = {}
        for p in members:
            alike.setdefault((self.state[p]["step"], p.device, p.dtype, p.ndim > 1), []).append(p)
        for (_, device, *_), found in alike.items():
            limit = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BATCH
            batch: list[nn.Parameter] = []
            size = 0
            for p in found:
                if batch and size + p.numel() > limit:
                    yield batch
                    batch, size = [], 0
                batch.append(p)
                size += p.numel()
            yield batch

    def _move(self, group: dict[str, Any], batch: list[nn.Parameter]) -> None:
        params: list[Tensor] = [*batch]
        grads, states = [p.grad for p in batch if p.grad is not None], [self.state[p] for p in batch]
        lr, t, dtype = group["lr"], states[0]["step"], params[0].dtype
        exact = torch.promote_types(dtype, torch.float32)  # of norms and step sizes
        roots = [math.sqrt(p.numel()) for p in params]
        alphas = torch._foreach_norm(params, 2, exact)
        torch._foreach_div_(alphas, roots)
        torch._foreach_clamp_min_(alphas, group["eps2"])
        torch._foreach_mul_(alphas, -min(lr, 1 / math.sqrt(t)))
        if group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])

        eps1 = torch.finfo(dtype).eps if group["eps1"] is None else group["eps1"]
        direct = _factored_directions if params[0].ndim > 1 else _directions
        directions, norms = direct(grads, states, t ** group["beta2_decay"], eps1, exact)
        torch._foreach_div_(norms, [root * group["clip_threshold"] for root in roots])
        torch._foreach_clamp_min_(norms, 1.0)
        torch._foreach_div_(alphas, norms)
        for p, blocks, alpha in zip(params, directions, alphas, strict=True):
            if p.is_cpu:
                rate = float(alpha)
                for part, u in zip(p.split(len(blocks[0])) if len(blocks) > 1 else [p], blocks, strict=True):
                    part.add_(u, alpha=rate)
            else:  # reading alpha would wait for the device
                p.addcmul_(blocks[0], alpha.to(dtype))


def _zeros(p: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's second moment before its first step."""
    if p.ndim < 2:
        return {"variance": torch.zeros_like(p)}
    return {"row": p.new_zeros(*p.shape[:-1], 1), "column": p.new_zeros(*p.shape[:-2], 1, p.shape[-1])}


def _largest_factor(eps1: float, dtype: torch.dtype) -> float:
    """Upper bound of 1/sqrt(V); squares below the smallest normal number are lost, so it ends there at the latest."""
    return 1 / max(eps1, math.sqrt(torch.finfo(dtype).tiny))


def _directions(
    grads: list[Tensor], states: list[dict[str, Any]], weight: float, eps1: float, exact: torch.dtype
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """u before it is clipped, and its norms, of tensors with fewer than 2 dimensions."""
    variances = [s["variance"] for s in states]
    torch._foreach_lerp_(variances, torch._foreach_mul(grads, grads), weight)
    directions = torch._foreach_rsqrt(variances)
    torch._foreach_clamp_max_(directions, _largest_factor(eps1, grads[0].dtype))
    torch._foreach_mul_(directions, grads)
    return [[u] for u in directions], list(torch._foreach_norm(directions, 2, exact))


def _factored_directions(
    grads: list[Tensor], states: list[dict[str, Any]], weight: float, eps1: float, exact: torch.dtype
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """u before it is clipped, in blocks of the first dimension, and its norms, of tensors with 2 dimensions or more."""
    rows, columns, dtype = [s["row"] for s in states], [s["column"] for s in states], grads[0].dtype
    length = _block_length(grads)
    row_means, column_means = _square_means(grads) if length is None else _square_means_of_one(grads[0], length)
    torch._foreach_lerp_(rows, row_means, weight)
    torch._foreach_lerp_(columns, column_means, weight)
    # 1/sqrt(V) = sqrt(max(mean(R), eps1) / R) / sqrt(C)
    means = [r.mean(-2, keepdim=True) for r in rows]
    torch._foreach_clamp_min_(means, max(eps1, torch.finfo(dtype).tiny))
    row_factors = [m / r for m, r in zip(means, rows, strict=True)]
    torch._foreach_sqrt_(row_factors)
    column_factors, bound = list(torch._foreach_rsqrt(columns)), _largest_factor(eps1, dtype)
    if length is None:
        directions = _bounded_products(grads, row_factors, column_factors, bound)
        return [[u] for u in directions], list(torch._foreach_norm(directions, 2, exact))
    (g,), (row,), (column,) = grads, row_factors, column_factors
    blocks, norms = [], []
    for i, part in enumerate(zip(g.split(length), row.split(length), strict=True)):
        of_part = column[i * length : (i + 1) * length] if g.ndim > 2 else column
        blocks += _bounded_products([part[0]], [part[1]], [of_part], bound)
        norms.append(torch.linalg.vector_norm(blocks[-1], dtype=exact))
    return [blocks], [torch.linalg.vector_norm(torch.stack(norms))]


def _block_length(grads: list[Tensor]) -> int | None:
    """Entries of the first dimension that fit the cache; None for a batch that is worked on whole."""
    g = grads[0]
    if len(grads) > 1 or not g.is_cpu or g.numel() <= _CPU_BLOCK or g.shape[0] == 1:
        return None
    return max(1, _CPU_BLOCK * g.shape[0] // g.numel())


def _square_means(grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Row means (..., m, 1) and column means (..., 1, n) of g^2, g (..., m, n)."""
    squares = torch._foreach_mul(grads, grads)
    return [s.mean(-1, keepdim=True) for s in squares], [s.mean(-2, keepdim=True) for s in squares]


def _square_means_of_one(g: Tensor, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """The same of one large tensor, block by block."""
    rows, columns = [], []
    for block in g.split(length):
        square = block.square()
        rows.append(square.mean(-1, keepdim=True))
        columns.append(square.sum(-2, keepdim=True))
    column = torch.cat(columns) if g.ndim > 2 else torch.cat(columns).sum(0, keepdim=True)
    return [torch.cat(rows)], [column.div_(g.shape[-2])]


def _bounded_products(grads: list[Tensor], rows: list[Tensor], columns: list[Tensor], bound: float) -> list[Tensor]:
    """g min(row column, bound)."""
    products = [r * c for r, c in zip(rows, columns, strict=True)]
    torch._foreach_clamp_max_(products, bound)
    torch._foreach_mul_(products, grads)
    return products
