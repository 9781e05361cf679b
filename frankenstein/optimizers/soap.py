"""SOAP: Adam in the eigenbasis of Shampoo's factors.

    G' = Q_L^T G Q_R;  m <- b1 m + (1 - b1) G';  v <- b2 v + (1 - b2) G'^2             m, v live in the eigenbasis
    theta <- theta - lr sqrt(1 - b2^t) / (1 - b1^t) Q_L (m / (sqrt(v) + eps)) Q_R^T;  theta <- (1 - lr wd) theta
    L <- bs L + (1 - bs) G G^T;  R <- bs R + (1 - bs) G^T G
    every precondition_frequency steps: Q <- qr(L Q), columns by falling diag(Q^T L Q); m, v follow the new basis
Source: Vyas et al. 2024, algorithm 3, https://arxiv.org/abs/2409.11321. Where we differ: m leaves the eigenbasis only
when that changes, which is the same up to rounding and saves four of ten matrix products a step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS, Method
from frankenstein.optimizers.factors import (
    add_gram,
    along,
    decompose,
    dense_gradient,
    keep_number_types,
    portions,
    whole,
    working,
)


@OPTIMIZERS.register("soap")
class SOAP(Method):
    """SOAP; the first gradient of a parameter only starts its factors and bases and moves nothing.

    A tensor with two or more dimensions has a factor and a basis (d_i, d_i) for every dimension up to max_precond_dim;
    an embedding table with fewer rows than that gets one of rows x rows. Scalars, and vectors without precondition_1d,
    take plain Adam. A first eigendecomposition that does not converge in float32 is done in float64. State of
    half-precision parameters is float32.
    """

    name = "soap"

    def __init__(  # noqa: PLR0913  the method's hyperparameters, keyword only
        self,
        params: ParamsT,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "shampoo_beta": shampoo_beta,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "precondition_1d": precondition_1d,
        }
        super().__init__(params, arguments)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        ready = [p for p in members if self.state[p]]
        self._start(group, [p for p in members if not self.state[p]])
        for part in portions(ready):
            self._move(group, part)
        due = [s for s in (self.state[p] for p in ready) if s["step"] % group["precondition_frequency"] == 0]
        _turn(group, due)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        keep_number_types(self, state_dict)

    def _start(self, group: dict[str, Any], fresh: list[nn.Parameter]) -> None:
        """Factors of the first gradient and their eigenvectors."""
        for p in fresh:
            zeros = torch.zeros_like(working(p.detach()), memory_format=torch.contiguous_format)
            gradient = working(dense_gradient(self.name, p))
            state = self.state[p]
            state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
            for dim in _dims(zeros, group):
                state[f"factor_{dim}"] = zeros.new_zeros(zeros.shape[dim], zeros.shape[dim])
            _accumulate(group, state, gradient)
        sides = [(state, dim) for state in (self.state[p] for p in fresh) for dim in _dims(state["exp_avg"], group)]
        found = decompose(_eigenvectors, [state[f"factor_{dim}"] for state, dim in sides])
        for (state, dim), (basis,) in zip(sides, found, strict=True):
            state[f"basis_{dim}"] = basis

    def _move(self, group: dict[str, Any], part: list[Tensor]) -> None:
        """Adam's step in the eigenbasis, then the decay, then the factors."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in part]
        averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        gradients = [working(dense_gradient(self.name, p)) for p in part]
        turned = [_into(gradient, state, group) for gradient, state in zip(gradients, states, strict=True)]
        torch._foreach_lerp_(averages, turned, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, turned, turned, 1 - beta2)
        denominators = list(torch._foreach_sqrt(squares))
        torch._foreach_add_(denominators, group["eps"])
        steps = [
            _out_of(step, state, group)
            for step, state in zip(torch._foreach_div(averages, denominators), states, strict=True)
        ]
        for state in states:
            state["step"] += 1
        rates = [group["lr"] * (1 - beta2 ** s["step"]) ** 0.5 / (1 - beta1 ** s["step"]) for s in states]
        torch._foreach_mul_(steps, rates)
        torch._foreach_sub_(part, steps)
        if group["weight_decay"]:
            torch._foreach_mul_(part, 1 - group["lr"] * group["weight_decay"])
        for gradient, state in zip(gradients, states, strict=True):
            _accumulate(group, state, gradient)


def _accumulate(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> None:
    """The factors take the gradient in."""
    beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
    for dim in _dims(gradient, group):
        add_gram(state[f"factor_{dim}"], gradient, dim, keep=beta, add=1 - beta)


def _dims(tensor: Tensor, group: dict[str, Any]) -> list[int]:
    """The dimensions that are preconditioned."""
    if tensor.ndim < 2 and not group["precondition_1d"]:
        return []
    return [i for i, size in enumerate(tensor.shape) if size <= group["max_precond_dim"]]


def _eigenvectors(factors: Tensor) -> Tensor:
    """(n, N, N) -> eigenvectors as columns, largest eigenvalue first."""
    ridge = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device) * 1e-30
    return torch.linalg.eigh(factors + ridge).eigenvectors.flip(-1)


def _into(tensor: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Coordinates in the eigenbasis."""
    for dim in _dims(tensor, group):
        tensor = along(tensor, state[f"basis_{dim}"].mT, dim)
    return tensor


def _out_of(tensor: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Back from the eigenbasis."""
    for dim in _dims(tensor, group):
        tensor = along(tensor, state[f"basis_{dim}"], dim)
    return tensor


def _turn(group: dict[str, Any], states: list[dict[str, Any]]) -> None:
    """One step of power iteration and QR for every basis; m is carried over, v is sorted."""
    sides = [(state, dim) for state in states for dim in _dims(state["exp_avg"], group)]
    for state in states:
        state["exp_avg"] = _out_of(state["exp_avg"], state, group)
    iterated = []
    for state, dim in sides:
        basis = state[f"basis_{dim}"]
        image = whole(state[f"factor_{dim}"]) @ basis
        order = (basis * image).sum(0).argsort(descending=True, stable=True)
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(dim, order)
        iterated.append(image[:, order])
    found = decompose(lambda matrices: torch.linalg.qr(matrices).Q, iterated)
    for (state, dim), (basis,) in zip(sides, found, strict=True):
        state[f"basis_{dim}"] = basis
    for state in states:
        state["exp_avg"] = _into(state["exp_avg"], state, group)
