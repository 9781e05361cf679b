"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

    theta <- (1 - lr wd) theta;  theta <- theta - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g
Source: Chen et al. 2023, algorithm 2, https://arxiv.org/abs/2302.06675.
"""

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, decay


@OPTIMIZERS.register("lion")
class Lion(Elementwise):
    """Lion; one state tensor a parameter, no eps. Every element moves by lr or, where the sum is 0, not at all."""

    name = "lion"
    slots = ("m",)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m,), lr, (beta1, beta2) = lists.state, group["lr"], group["betas"]
        signs = torch._foreach_lerp(m, lists.grads, 1 - beta1)
        torch._foreach_sign_(signs)
        decay(lists.params, lr * group["weight_decay"])
        torch._foreach_add_(lists.params, signs, alpha=-lr)
        average(m, lists.grads, beta2)
