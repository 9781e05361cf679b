"""Cautious AdamW: AdamW without the coordinates in which the averaged and the present gradient disagree.

    theta <- (1 - lr wd) theta;  m, v: Adam's averages;  mask = [m g > 0] / max(mean [m g > 0], cautious_clip)
    theta <- theta - lr sqrt(1 - b2^t) / (1 - b1^t) m mask / (sqrt(v) + eps),   the mean per tensor
Source: Liang et al. 2024, https://arxiv.org/abs/2411.16085; the floor of the mean, and eps before the bias
correction, as in the authors' implementation (the paper's first version scales by numel / (sum + 1)).
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
    decay,
    roots,
    squared_norms,
)


@OPTIMIZERS.register("cautious_adamw")
class CautiousAdamW(Scaled):
    """Cautious AdamW; two state tensors a parameter. The decay is not masked, and gradients are not clipped."""

    name = "cautious_adamw"
    slots = ("m", "v")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        cautious_clip: float = 1e-3,
    ) -> None:
        arguments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**arguments, "cautious_clip": cautious_clip})

    def absorb(self, group: Group, step: int, lists: Lists) -> None:
        (m, v), (beta1, beta2) = lists.state, group["betas"]
        average(m, lists.grads, beta1)
        average_squares(v, lists.grads, beta2)

    def propose(self, group: Group, step: int, lists: Lists) -> Tensors:
        mask = torch._foreach_mul(lists.state[0], lists.grads)
        torch._foreach_sign_(mask)
        torch._foreach_clamp_min_(mask, 0)
        return mask

    def sums(self, lists: Lists) -> tuple[Tensors, ...]:
        counts = squared_norms(lists.proposal)  # ten times as fast on a CPU as adding up, and rounded just as exact
        torch._foreach_round_(counts)
        return (counts,)

    def factors(self, group: Group, sizes: list[int], *sums: Tensors) -> Tensors:
        means = torch._foreach_mul(sums[0], [1 / max(size, 1) for size in sizes])
        torch._foreach_clamp_min_(means, group["cautious_clip"])
        return torch._foreach_reciprocal(means)

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m, v), updates, lr, (beta1, beta2) = lists.state, lists.proposal, group["lr"], group["betas"]
        torch._foreach_mul_(updates, m)
        decay(lists.params, lr * group["weight_decay"])
        rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        torch._foreach_addcdiv_(lists.params, updates, roots(v, group["eps"]), -rate)
