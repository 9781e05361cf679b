"""Adan: Nesterov momentum by differences of gradients, each gradient evaluated once.

    d_t = g_t - g_{t-1}  (0 at t = 1)
    m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) d;  n <- b3 n + (1 - b3) (g + b2 d)^2
    theta <- (theta - lr (mhat + b2 shat) / (sqrt(nhat) + eps)) / (1 + lr wd),   hats: / (1 - b^t)
Source: Xie et al. 2022, algorithm 1, https://arxiv.org/abs/2208.06677; the betas here are 1 minus the paper's, and the
averages are bias-corrected, both as in the authors' implementation.
"""

import math

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, average_squares, roots


@OPTIMIZERS.register("adan")
class Adan(Elementwise):
    """Adan; four state tensors a parameter, one of them a copy of the previous gradient. Three betas."""

    name = "adan"
    slots = ("m", "s", "n", "previous")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m, s, n, previous), lr, (beta1, beta2, beta3) = lists.state, group["lr"], group["betas"]
        if step == 1:
            torch._foreach_copy_(previous, lists.grads)
        change = torch._foreach_sub(lists.grads, previous)
        torch._foreach_copy_(previous, lists.grads)
        average(m, lists.grads, beta1)
        average(s, change, beta2)
        ahead = torch._foreach_add(lists.grads, change, alpha=beta2)
        average_squares(n, ahead, beta3)
        # The bias corrections of m and n go into the step's factor, that of s into its weight beside m.
        correction1, correction2, correction3 = 1 - beta1**step, 1 - beta2**step, math.sqrt(1 - beta3**step)
        torch._foreach_copy_(change, m)
        torch._foreach_add_(change, s, alpha=beta2 * correction1 / correction2)
        rate = lr * correction3 / correction1
        torch._foreach_addcdiv_(lists.params, change, roots(n, group["eps"] * correction3), -rate)
        if group["weight_decay"] != 0:
            torch._foreach_div_(lists.params, 1 + lr * group["weight_decay"])
