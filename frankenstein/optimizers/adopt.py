"""ADOPT: Adam with the second moment of the steps before, which converges with any beta2.

    t = 1:  v <- g^2, nothing else
    t > 1:  theta <- (1 - lr wd) theta;  u = clip(g / max(sqrt(v), eps), +-(t - 1)^(1/4));  m <- b1 m + (1 - b1) u
            theta <- theta - lr m;  v <- b2 v + (1 - b2) g^2
Source: Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853; the clipping is the authors' later
addition, which keeps the first gradient of an embedding row (v = 0 there) from a step of g / eps.
"""

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, average_squares, decay


@OPTIMIZERS.register("adopt")
class ADOPT(Elementwise):
    """ADOPT; two state tensors a parameter. The first step of a parameter moves nothing, and does not decay it."""

    name = "adopt"
    slots = ("m", "v")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m, v), lr, (beta1, beta2) = lists.state, group["lr"], group["betas"]
        if step == 1:
            torch._foreach_addcmul_(v, lists.grads, lists.grads)
            return
        decay(lists.params, lr * group["weight_decay"])
        denominators = torch._foreach_sqrt(v)
        torch._foreach_clamp_min_(denominators, group["eps"])
        updates, bound = torch._foreach_div(lists.grads, denominators), (step - 1) ** 0.25
        torch._foreach_clamp_min_(updates, -bound)
        torch._foreach_clamp_max_(updates, bound)
        average(m, updates, beta1)
        torch._foreach_add_(lists.params, m, alpha=-lr)
        average_squares(v, lists.grads, beta2)
