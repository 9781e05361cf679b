"""MARS-AdamW: AdamW on a gradient with its variance reduced by the previous one.

    c = g_t + gamma b1 / (1 - b1) (g_t - g_{t-1}),  g_0 = 0;   c <- c / ||c|| where ||c|| > 1, per tensor
    m <- b1 m + (1 - b1) c;  v <- b2 v + (1 - b2) c^2
    theta <- theta - lr (wd theta + mhat / (sqrt(vhat) + eps))
Vectors (ndim < 2), unless optimize_1d: AdamW with betas_1d, weight_decay_1d and the rate lr lr_1d / (constructor's lr).
Source: Yuan et al. 2024, https://arxiv.org/abs/2411.10438; g_{t-1} is the gradient of the step before (the
paper's approximate form), kept as a copy, which the authors' code aliases; eps and lr_1d hold per group.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import (
    Cluster,
    Group,
    Lists,
    Scaled,
    Tensors,
    average,
    average_squares,
    decay,
    roots,
    squared_norms,
)


@OPTIMIZERS.register("mars_adamw")
class MARSAdamW(Scaled):
    """MARS-AdamW; three state tensors a matrix, two a vector.

    Raises:
        FrankensteinError: beside wrong arguments, for a group with lr > 0 where the constructor's lr is 0, since the
            rate of vectors is relative to it.
    """

    name = "mars_adamw"
    slots = ("m", "v", "previous")

    def __init__(  # noqa: PLR0913  one keyword for each argument of the contract
        self,
        params: ParamsT,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
    ) -> None:
        arguments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gamma": gamma}
        of_vectors = {"lr_1d": lr_1d, "betas_1d": betas_1d, "weight_decay_1d": weight_decay_1d}
        super().__init__(params, {**arguments, "optimize_1d": optimize_1d, **of_vectors})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(dict(param_group))
        group = self.param_groups[-1]
        group["constructor_lr"] = self.defaults["lr"]  # in the group, so that a resumed run has it
        if group["constructor_lr"] == 0 and group["lr"] != 0 and not group["optimize_1d"]:
            raise FrankensteinError(
                f"mars_adamw: lr: found 0, and {group['lr']} in a group: expected more than 0, since vectors take "
                "their group's lr times lr_1d / lr"
            )

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        vectors = [] if group["optimize_1d"] else [p for p in members if p.ndim < 2]
        matrices = [p for p in members if p.ndim >= 2 or group["optimize_1d"]]
        self.advance(group, matrices, self.slots, self.work)
        share = group["lr_1d"] / group["constructor_lr"] if group["lr"] != 0 else 0.0
        of_vectors = {"lr": group["lr"] * share, "betas": group["betas_1d"], "weight_decay": group["weight_decay_1d"]}
        self.advance({**group, **of_vectors}, vectors, ("m", "v"), self._plain)

    def _plain(self, group: Group, step: int, clusters: list[Cluster]) -> None:
        for cluster in clusters:
            for lists in cluster.calls:
                lists.proposal = lists.grads
                self.move(group, step, lists)

    def propose(self, group: Group, step: int, lists: Lists) -> Tensors:
        previous, beta1 = lists.state[2], group["betas"][0]
        # lerp goes beyond its start: g - w (g_before - g)
        return torch._foreach_lerp(lists.grads, previous, -group["gamma"] * beta1 / (1 - beta1))

    def sums(self, lists: Lists) -> tuple[Tensors, ...]:
        return (squared_norms(lists.proposal),)

    def factors(self, group: Group, sizes: list[int], *sums: Tensors) -> Tensors:
        norms = torch._foreach_sqrt(sums[0])
        torch._foreach_clamp_min_(norms, 1)
        return torch._foreach_reciprocal(norms)

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m, v, *previous), lr, (beta1, beta2) = lists.state, group["lr"], group["betas"]
        average(m, lists.proposal, beta1)
        average_squares(v, lists.proposal, beta2)
        decay(lists.params, lr * group["weight_decay"])
        correction = math.sqrt(1 - beta2**step)
        rate = lr * correction / (1 - beta1**step)
        torch._foreach_addcdiv_(lists.params, m, roots(v, group["eps"] * correction), -rate)
        if previous:
            torch._foreach_copy_(previous[0], lists.grads)
