"""AdEMAMix: Adam with a second, much slower average of the gradients beside the first.

    m1 <- b1 m1 + (1 - b1) g;  m2 <- b3_t m2 + (1 - b3_t) g;  v <- b2 v + (1 - b2) g^2
    theta <- theta - lr ((m1 / (1 - b1^t) + alpha_t m2) / (sqrt(v / (1 - b2^t)) + eps) + wd theta)
    alpha_t = alpha min(1, t / alpha_warmup);  b3_t from b1 to b3 within beta3_warmup steps, linear in its half-life
Source: Pagliardini et al. 2024, algorithm 1 and section 3, https://arxiv.org/abs/2409.03137. The warm-ups count the
steps of each parameter; without them (the default, as in the authors' code) alpha and b3 hold from the first step.
"""

import math

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, average_squares, decay, roots


@OPTIMIZERS.register("ademamix")
class AdEMAMix(Elementwise):
    """AdEMAMix; three state tensors a parameter. Three betas: fast average, squares, slow average."""

    name = "ademamix"
    slots = ("m1", "m2", "v")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
    ) -> None:
        arguments = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**arguments, "alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup})

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m1, m2, v), lr, (beta1, beta2, beta3) = lists.state, group["lr"], group["betas"]
        alpha = group["alpha"] * min(1.0, step / (group["alpha_warmup"] or 1))
        average(m1, lists.grads, beta1)
        average(m2, lists.grads, slow_beta(step, beta1, beta3, group["beta3_warmup"]))
        average_squares(v, lists.grads, beta2)
        correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        mixed = torch._foreach_add(m1, m2, alpha=alpha * correction1)
        decay(lists.params, lr * group["weight_decay"])
        rate = lr * correction2 / correction1
        torch._foreach_addcdiv_(lists.params, mixed, roots(v, group["eps"] * correction2), -rate)


def slow_beta(step: int, start: float, end: float, warmup: int | None) -> float:
    """The slow average's decay rate at a step (from 1): linear in the half-life log(1/2) / log(beta), then `end`."""
    if warmup is None or step >= warmup:
        return end
    share = step / warmup
    half_life = (1 - share) * _half_life(start) + share * _half_life(end)
    return 0.5 ** (1 / half_life) if half_life > 0 else 0.0


def _half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta) if beta > 0 else 0.0
