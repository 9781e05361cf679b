"""RAdam: Adam with its adaptive rate rectified while the second moment has too few samples to be trusted.

    theta <- (1 - lr wd) theta;  m, v: Adam's averages;  r_inf = 2/(1 - b2) - 1;  r = r_inf - 2 t b2^t / (1 - b2^t)
    r > 5:  theta <- theta - lr rect mhat / ((sqrt(v) + eps) / sqrt(1 - b2^t)),
            rect = sqrt((r - 4)(r - 2) r_inf / ((r_inf - 4)(r_inf - 2) r))
    else:   theta <- theta - lr mhat
Source: Liu et al. 2019, algorithm 2, https://arxiv.org/abs/1908.03265; eps and the threshold 5 as in torch.optim.RAdam,
whose weight decay is by default not decoupled, unlike here.
"""

import math

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, average_squares, decay, roots


@OPTIMIZERS.register("radam")
class RAdam(Elementwise):
    """RAdam; two state tensors a parameter. Until r > 5 (5 steps at beta2 = 0.999) it steps along mhat itself."""

    name = "radam"
    slots = ("m", "v")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m, v), lr, (beta1, beta2) = lists.state, group["lr"], group["betas"]
        average(m, lists.grads, beta1)
        average_squares(v, lists.grads, beta2)
        decay(lists.params, lr * group["weight_decay"])
        rate, rectification = lr / (1 - beta1**step), rectify(step, beta2)
        if rectification is None:
            torch._foreach_add_(lists.params, m, alpha=-rate)
        else:
            rate *= rectification * math.sqrt(1 - beta2**step)
            torch._foreach_addcdiv_(lists.params, m, roots(v, group["eps"]), -rate)


def rectify(step: int, beta2: float) -> float | None:
    """The factor of the adaptive step, or None where the variance of its rate is intractable."""
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5:
        return None
    return math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
