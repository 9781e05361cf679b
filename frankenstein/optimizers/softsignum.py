"""SoftSignum: the sign of the momentum, which a falling temperature turns into steps proportional to it.

    theta <- (1 - lr wd) theta;  buf_1 = g, buf <- mu buf + (1 - dampening) g;  u = buf, g + mu buf with nesterov, or g
    t <= sign_steps: theta <- theta - lr sign(u);  later: theta <- theta - lr tanh(T_k u)
T is built once per group from the u of all its parameters at t = sign_steps + 1, see temperature.py; its saturation
is atanh(1 - sat_eps).
Source: Feoktistov et al. 2026, algorithm 1, https://arxiv.org/abs/2605.31371. Where we differ: t_max is 1e9, SoftMuon's
value, where the published code has 20, which caps the whole schedule of gradients much smaller than 1.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, Tensors, decay
from frankenstein.optimizers.temperature import Softening


@OPTIMIZERS.register("softsignum")
class SoftSignum(Softening, Elementwise):
    """SoftSignum; the buffer is a sum, about 1 / (1 - momentum) times the gradient, not an average.

    `ignore_zeros` leaves exact zeros out of the statistics: in an embedding table whose rows were mostly never touched
    they would make both medians 0, and the group would never soften.
    Raises:
        FrankensteinError: for nesterov without momentum or with dampening, and as Softening.
    """

    name = "softsignum"
    flags = ("ignore_zeros",)

    def __init__(  # noqa: PLR0913  the method's hyperparameters, keyword only
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        sign_steps: int = 9000,
        transition_steps: int = 1000,
        sat_eps: float = 1e-4,
        newton_steps: int = 10,
        t_max: float = 1e9,
        ignore_zeros: bool = False,
    ) -> None:
        arguments = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "sign_steps": sign_steps,
            "transition_steps": transition_steps,
            "sat_eps": sat_eps,
            "newton_steps": newton_steps,
            "t_max": t_max,
            "ignore_zeros": ignore_zeros,
        }
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        merged = {**self.defaults, **param_group}
        if merged["nesterov"] and (merged["momentum"] == 0 or merged["dampening"] != 0):
            raise FrankensteinError("softsignum: nesterov=True needs a momentum above 0 and dampening 0")
        super().add_param_group(param_group)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        if self.softened(group) and group["schedule"] is None:
            u = self._directions_ahead(group, members)
            self.start(group, u[u != 0] if group["ignore_zeros"] else u, math.atanh(1 - group["sat_eps"]))
        slots = ("momentum_buffer",) if group["momentum"] != 0 else ()
        self.advance(group, members, slots, self.work)

    def move(self, group: Group, step: int, lists: Lists) -> None:
        directions = _directions(group, step, lists.grads, *lists.state)
        T = self.temperature(group)
        if T is None:
            steps = torch._foreach_sign(directions)
        else:
            steps = torch._foreach_mul(directions, T)
            torch._foreach_tanh_(steps)
        decay(lists.params, group["lr"] * group["weight_decay"])
        torch._foreach_add_(lists.params, steps, alpha=-group["lr"])

    def _directions_ahead(self, group: Group, members: list[nn.Parameter]) -> Tensor:
        """The u of the step that is about to be made, all members in one tensor; changes no state."""
        grads = [p.grad for p in members if p.grad is not None]
        found = []
        for p, grad in zip(members, grads, strict=True):
            state = self.state[p]
            buffer = state.get("momentum_buffer", grad).clone()
            (u,) = _directions(group, state.get("step", 0) + 1, [grad], [buffer])
            found.append(u.flatten().to(members[0].device))
        return torch.cat(found)


def _directions(group: Group, step: int, grads: Tensors, buffers: Tensors = ()) -> Tensors:
    """u; the buffers take in the gradients. Not to be written to, since it may be either of them."""
    momentum = group["momentum"]
    if momentum == 0:
        return grads
    if step == 1:
        torch._foreach_copy_(buffers, grads)
    else:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
    return torch._foreach_add(grads, buffers, alpha=momentum) if group["nesterov"] else buffers
