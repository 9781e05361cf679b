"""Shampoo: a gradient preconditioned by one matrix for each of its dimensions.

    F_i <- b2 F_i + (1 - b2) G_i G_i^T           G_i: the gradient unfolded along dimension i; b2 = 1: F_i + G_i G_i^T
    m <- b1 m + (1 - b1) g;  d = m x_1 (F_1 + eps I)^(-1/2k) ... x_k (F_k + eps I)^(-1/2k)
    d <- d ||a|| / ||d||,  a = m / (sqrt(v) + graft_eps)         grafting: the length of Adam's step
    theta <- (1 - lr wd) theta - lr d                            F, m, v bias-corrected
Sources: Gupta et al. 2018, algorithm 2, https://arxiv.org/abs/1802.09568 (betas=(0, 1), bias_correction=False and
grafting=None give it); Shi et al. 2023, https://arxiv.org/abs/2309.06497. Where we differ from the latter: dimensions
are never merged, and one above max_precond_dim is left out instead of cut into blocks.
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
    working,
)


@OPTIMIZERS.register("shampoo")
class Shampoo(Method):
    """Shampoo with exponential averages and Adam's step length, or Gupta's sums (see the module).

    A tensor (d_1, ..., d_k) has k factors (d_i, d_i) and as many roots; a scalar counts as a vector. The roots are
    renewed at the steps 1, f, 2f, ... of a parameter (f = precondition_frequency) by eigendecomposition, eigenvalues
    below 0 taken as 0; where that does not converge in float32, in float64. State of half-precision parameters is
    float32.
    """

    name = "shampoo"

    def __init__(  # noqa: PLR0913  the method's hyperparameters, keyword only
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        grafting: str | None = "adam",
        graft_eps: float = 1e-8,
        graft_beta2: float = 0.999,
        precondition_frequency: int = 1,
        max_precond_dim: int = 8192,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grafting": grafting,
            "graft_eps": graft_eps,
            "graft_beta2": graft_beta2,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        super().__init__(params, arguments)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        for p in members:
            if not self.state[p]:
                self.state[p].update(_new_state(p, group))
        parts = portions(members)
        for part in parts:
            self._accumulate(group, part)
        self._renew_roots(group, members)
        for part in parts:
            self._move(group, part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        keep_number_types(self, state_dict)

    def _accumulate(self, group: dict[str, Any], part: list[Tensor]) -> None:
        """The moving averages and the factors take the gradient in."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in part]
        gradients = [working(_at_least_1d(dense_gradient(self.name, p))) for p in part]
        torch._foreach_lerp_([s["exp_avg"] for s in states], gradients, 1 - beta1)
        if group["grafting"]:
            squares = [s["exp_avg_sq"] for s in states]
            torch._foreach_mul_(squares, group["graft_beta2"])
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["graft_beta2"])
        for gradient, state in zip(gradients, states, strict=True):
            state["step"] += 1
            for dim in _dims(gradient, group):
                add_gram(state[f"factor_{dim}"], gradient, dim, keep=beta2, add=1 - beta2 if beta2 < 1 else 1.0)

    def _renew_roots(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        """(F + eps I)^(-1/2k) of the parameters that are due."""
        every = group["precondition_frequency"]
        due = [s for s in (self.state[p] for p in members) if s["step"] == 1 or s["step"] % every == 0]
        sides = [(state, dim) for state in due for dim in _dims(state["exp_avg"], group)]
        found = decompose(torch.linalg.eigh, [state[f"factor_{dim}"] for state, dim in sides])
        for (state, dim), (values, vectors) in zip(sides, found, strict=True):
            corrected = values.clamp_(min=0) / _correction(group["betas"][1], state["step"], group)
            powers = (corrected + group["eps"]).pow_(-1 / (2 * state["exp_avg"].ndim))
            state[f"root_{dim}"] = (vectors * powers) @ vectors.mT

    def _move(self, group: dict[str, Any], part: list[Tensor]) -> None:
        states = [self.state[p] for p in part]
        directions = [_precondition(state, group) for state in states]
        factors = [group["lr"] / _correction(group["betas"][0], s["step"], group) for s in states]
        if group["grafting"]:
            lengths = self._graft_lengths(group, states)
            own = torch._foreach_norm(directions)
            torch._foreach_add_(own, 1e-16)  # a direction of zero stays zero
            torch._foreach_div_(lengths, own)
            torch._foreach_mul_(lengths, factors)
            torch._foreach_mul_(directions, lengths)
        else:
            torch._foreach_mul_(directions, factors)
        parameters = [_at_least_1d(p.detach()) for p in part]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, directions)

    def _graft_lengths(self, group: dict[str, Any], states: list[dict[str, Any]]) -> list[Tensor]:
        """||m / (sqrt(v) + graft_eps)||, m not bias-corrected: that factor is common to the whole step."""
        denominators = list(torch._foreach_sqrt([s["exp_avg_sq"] for s in states]))
        roots = [_correction(group["graft_beta2"], s["step"], group) ** 0.5 for s in states]
        torch._foreach_div_(denominators, roots)
        torch._foreach_add_(denominators, group["graft_eps"])
        return list(torch._foreach_norm(torch._foreach_div([s["exp_avg"] for s in states], denominators)))


def _new_state(p: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
    zeros = torch.zeros_like(working(_at_least_1d(p.detach())), memory_format=torch.contiguous_format)
    state: dict[str, Any] = {"step": 0, "exp_avg": zeros}
    if group["grafting"]:
        state["exp_avg_sq"] = zeros.clone()
    for dim in _dims(zeros, group):
        state[f"factor_{dim}"] = zeros.new_zeros(zeros.shape[dim], zeros.shape[dim])
    return state


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim else tensor.view(1)


def _dims(tensor: Tensor, group: dict[str, Any]) -> list[int]:
    """The dimensions that are preconditioned."""
    return [i for i, size in enumerate(tensor.shape) if size <= group["max_precond_dim"]]


def _correction(beta: float, step: int, group: dict[str, Any]) -> float:
    """What a moving average is divided by; 1 for a sum."""
    return 1 - beta**step if group["bias_correction"] and beta < 1 else 1.0


def _precondition(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """m times the root of every preconditioned dimension; a new tensor."""
    direction: Tensor = state["exp_avg"]
    for dim in _dims(direction, group):
        direction = along(direction, state[f"root_{dim}"], dim)
    return direction if direction is not state["exp_avg"] else direction.clone()
