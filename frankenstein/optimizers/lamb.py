"""LAMB: Adam's update rescaled per tensor to the norm of the tensor.

    m, v: Adam's averages;  u = mhat / (sqrt(vhat) + eps) + wd theta
    theta <- theta - lr (||theta|| / ||u||) u,   the ratio 1 where one of the norms is 0
Source: You et al. 2019, algorithm 2 with phi(x) = x, https://arxiv.org/abs/1904.00962. With bias correction and without
a bound of ||theta||, as the paper's text has it; no clipping of the global gradient norm, which is the training's.
"""

import math

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import (
    Group,
    Lists,
    Scaled,
    Tensors,
    average,
    average_squares,
    roots,
    squared_norms,
)


@OPTIMIZERS.register("lamb")
class LAMB(Scaled):
    """LAMB; two state tensors a parameter. Weight decay is inside the update; every tensor, vectors too, is scaled."""

    name = "lamb"
    slots = ("m", "v")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def absorb(self, group: Group, step: int, lists: Lists) -> None:
        (m, v), (beta1, beta2) = lists.state, group["betas"]
        average(m, lists.grads, beta1)
        average_squares(v, lists.grads, beta2)

    def propose(self, group: Group, step: int, lists: Lists) -> Tensors:
        (m, v), (beta1, beta2) = lists.state, group["betas"]
        correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        updates = torch._foreach_mul(lists.params, group["weight_decay"])
        torch._foreach_addcdiv_(updates, m, roots(v, group["eps"] * correction2), correction2 / correction1)
        return updates

    def sums(self, lists: Lists) -> tuple[Tensors, ...]:
        return squared_norms(lists.params), squared_norms(lists.proposal)

    def factors(self, group: Group, sizes: list[int], *sums: Tensors) -> Tensors:
        of_weights, of_updates = (torch.stack(list(squares)).sqrt() for squares in sums)
        ratios = of_weights / of_updates
        return torch.where((of_weights > 0) & (of_updates > 0), ratios, torch.ones_like(ratios)).unbind()

    def move(self, group: Group, step: int, lists: Lists) -> None:
        torch._foreach_add_(lists.params, lists.proposal, alpha=-group["lr"])
