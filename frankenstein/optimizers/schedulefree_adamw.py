"""Schedule-free AdamW: Adam's steps on z, gradients at y, and the average x of z in place of a learning-rate schedule.

    v <- b2 v + (1 - b2) g^2;  u = g / (sqrt(v / (1 - b2^t)) + eps) + wd y;  eta = lr min(1, t / warmup_steps)
    c = w / (sum of all w),  w = t^r (largest eta so far)^weight_lr_power
    z <- z - eta u;  x <- (1 - c) x + c z;  y = (1 - b1) z + b1 x
The parameters hold y or, after `eval`, x; the state has z. In y alone: y <- (1 - c) y + c z + eta (b1 (1 - c) - 1) u.
Source: Defazio et al. 2024, equations 3-5 and algorithm 1, https://arxiv.org/abs/2405.15682. Where we differ from the
authors' package: gradients are only read, and coming back from `eval` restores y exactly, not to rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average_squares, roots


@OPTIMIZERS.register("schedulefree_adamw")
class ScheduleFreeAdamW(Elementwise):
    """Schedule-free AdamW; two state tensors a parameter, three between `eval` and `train`.

    Evaluate, save and pack inside `modes.averaged_weights`. No other schedule goes on top: lr stays constant.
    A parameter that misses its gradient in a step, misses the step: its own t and weights count.
    Args:
        betas: the first one above 0, since x is found from y and z by dividing by it.
        warmup_steps: steps over which eta rises to lr.
        r: exponent of t in the average's weights.
        weight_lr_power: exponent of the rate in the average's weights.
    Raises:
        FrankensteinError: for an unknown argument or a senseless value; from `step` between `eval` and `train`.
    """

    name = "schedulefree_adamw"
    slots = ("v", "z")

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        arguments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        super().__init__(params, {**arguments, "r": r, "weight_lr_power": weight_lr_power})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1]["averaged"] = self.param_groups[0].get("averaged", False)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        super()._check(arguments)
        if "betas" in arguments and arguments["betas"][0] == 0:
            found = arguments["betas"]
            raise FrankensteinError(f"schedulefree_adamw: betas: found {found}: expected a first one above 0")

    @property
    def averaged(self) -> bool:
        """Whether the parameters hold x, the average."""
        return bool(self.param_groups[0]["averaged"])

    @torch.no_grad()
    def eval(self) -> None:
        """Put x into the parameters; nothing where it is there already."""
        for group in self.param_groups:
            if group["averaged"]:
                continue
            for p, state in self._moved(group):
                state["y"] = p.detach().clone()
                p.copy_(_average(p, state["z"], group))
            group["averaged"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Put y into the parameters; nothing where it is there already.

        Elements that still are what `eval` made of y become that y, bit for bit; where a parameter was changed in
        between, its value counts as x.
        """
        for group in self.param_groups:
            if not group["averaged"]:
                continue
            for p, state in self._moved(group):
                y, z = state.pop("y"), state["z"]
                p.copy_(torch.where(p == _average(y, z, group), y, torch.lerp(p, z, 1 - group["betas"][0])))
            group["averaged"] = False

    def _moved(self, group: dict[str, Any]) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [(p, self.state[p]) for p in group["params"] if self.state.get(p)]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if self.averaged:
            raise FrankensteinError(
                "schedulefree_adamw: step: the parameters hold averaged weights, since eval(): expected train() before"
            )
        return super().step(closure)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        alike: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for p in members:
            state = self.state[p]
            if not state:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                state.update(step=0, v=zeros, z=p.detach().clone(), lr_max=0.0, weight_sum=0.0)
            t, warmup = state["step"] + 1, group["warmup_steps"]
            eta = group["lr"] * min(1.0, t / warmup if warmup else 1.0)
            state["lr_max"] = max(state["lr_max"], eta)
            weight = t ** group["r"] * state["lr_max"] ** group["weight_lr_power"]
            state["weight_sum"] += weight
            share = weight / state["weight_sum"] if weight > 0 else 0.0
            alike[eta, share].append(p)
        for (eta, share), found in alike.items():
            self.advance({**group, "eta": eta, "share": share}, found, self.slots, self.work)

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (v, z), y, eta, c = lists.state, lists.params, group["eta"], group["share"]
        beta1, beta2 = group["betas"]
        average_squares(v, lists.grads, beta2)
        correction = math.sqrt(1 - beta2**step)  # u = correction * updates
        updates = torch._foreach_div(lists.grads, roots(v, group["eps"] * correction))
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, y, alpha=group["weight_decay"] / correction)
        torch._foreach_lerp_(y, z, c)
        torch._foreach_add_(y, updates, alpha=eta * correction * (beta1 * (1 - c) - 1))
        torch._foreach_add_(z, updates, alpha=-eta * correction)


def _average(y: Tensor, z: Tensor, group: dict[str, Any]) -> Tensor:
    """x from y = (1 - b1) z + b1 x."""
    return torch.lerp(y, z, 1 - 1 / group["betas"][0])
