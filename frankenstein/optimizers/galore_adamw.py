"""GaLore-AdamW: Adam on gradients projected to a low rank.

    R = g P^T (rows >= columns, P the first right singular vectors of a gradient) or P^T g (P the left ones)
    m <- b1 m + (1 - b1) R;  v <- b2 v + (1 - b2) R^2;  N = m / (sqrt(v) + eps)
    theta <- theta - lr sqrt(1 - b2^t) / (1 - b1^t) scale back(N);  theta <- (1 - lr wd) theta
Source: Zhao et al. 2024, algorithm 2, https://arxiv.org/abs/2403.03507, and the authors' code: eps is added before
the bias correction, the decay comes after the step, m and v stay as they are when the projection is renewed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, average_squares, decay, roots
from frankenstein.optimizers.factors import dense_gradient, portions
from frankenstein.optimizers.galore import add_back, project, projection


@OPTIMIZERS.register("galore_adamw")
class GaLoreAdamW(Elementwise):
    """Adam in the space of the `rank` largest singular directions, for the 2-D parameters of groups with a rank.

    The projection is renewed from the current gradient every update_proj_gap steps of a parameter, the first included;
    a rank above the smaller dimension is cut to that. Without a rank, and for other shapes: the same Adam, full size.
    """

    name = "galore_adamw"
    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
        }
        super().__init__(params, arguments)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        projected = [p for p in members if group["rank"] is not None and p.ndim == 2]
        self.advance(group, [p for p in members if group["rank"] is None or p.ndim != 2], self.slots, self.work)
        for part in portions(projected):
            self._move_projected(group, part)

    def move(self, group: Group, step: int, lists: Lists) -> None:
        m, v = lists.state
        average(m, lists.grads, group["betas"][0])
        average_squares(v, lists.grads, group["betas"][1])
        torch._foreach_addcdiv_(lists.params, m, roots(v, group["eps"]), -_rate(group, step))
        decay(lists.params, group["lr"] * group["weight_decay"])

    def _move_projected(self, group: dict[str, Any], part: list[Tensor]) -> None:
        gradients = [self._projected_gradient(group, p) for p in part]
        states = [self.state[p] for p in part]
        averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        average(averages, gradients, group["betas"][0])
        average_squares(squares, gradients, group["betas"][1])
        directions = torch._foreach_div(averages, roots(squares, group["eps"]))
        for p, direction, state in zip(part, directions, states, strict=True):
            add_back(p, direction, state["projection"], -_rate(group, state["step"]) * group["scale"])
        decay(part, group["lr"] * group["weight_decay"])

    def _projected_gradient(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """The gradient that Adam sees; counts the step, and makes the state at the first one."""
        state, gradient = self.state[p], dense_gradient(self.name, p)
        step = state.setdefault("step", 0)
        if step % group["update_proj_gap"] == 0:
            state["projection"] = projection(gradient, group["rank"])
        gradient = project(gradient, state["projection"])
        if step == 0:
            state["exp_avg"] = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = state["exp_avg"].clone()
        state["step"] = step + 1
        return gradient


def _rate(group: Group, step: int) -> float:
    """lr with Adam's two bias corrections."""
    beta1, beta2 = group["betas"]
    return float(group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step))
