"""Sophia-G: momentum divided by a running estimate of the Hessian's diagonal, clipped elementwise.

    theta <- (1 - lr wd) theta;  m <- b1 m + (1 - b1) g
    theta <- theta - lr clip(m / (rho bs h + 1e-15), -1, 1)
    every update_k steps: h <- b2 h + (1 - b2) ghat^2, ghat the gradient of the mean loss over bs sampled labels
Source: Liu et al. 2023, algorithms 2 and 3, https://arxiv.org/abs/2305.14342; bs stands in the step and not in h, as
in the authors' implementation, and no average is bias-corrected. h is 0 before its first update: steps of lr sign(m).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Elementwise, Group, Lists, average, average_squares, decay

_FLOOR = 1e-15


@OPTIMIZERS.register("sophia")
class Sophia(Elementwise):
    """Sophia with the Gauss-Newton-Bartlett estimate of the Hessian; two state tensors a parameter, no eps.

    The training asks `modes.wants_hessian` before a step. When it says yes, it draws a label from the model's own
    distribution for every term of the loss, runs backward on the mean loss of these, and calls `update_hessian`.
    Args:
        rho: a step is clipped where |m| > rho bs h.
        bs: terms averaged in the loss of the Hessian estimate (masked positions of all its micro-batches).
        update_k: steps between estimates; the same in all groups.
    Raises:
        FrankensteinError: for an unknown argument, a senseless value, or groups with unequal update_k.
    """

    name = "sophia"
    slots = ("m", "h")
    _bs: float | Tensor | None = None  # of the step that is being made

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        bs: int = 5120,
        update_k: int = 10,
    ) -> None:
        arguments = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay}
        super().__init__(params, {**arguments, "bs": bs, "update_k": update_k})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        found = param_group.get("update_k", self.defaults["update_k"])
        if self.param_groups and found != self.update_k:
            raise FrankensteinError(f"sophia: update_k: found {found}: expected {self.update_k} in all groups")
        super().add_param_group(param_group)

    @property
    def update_k(self) -> int:
        """Steps between Hessian estimates."""
        return int(self.param_groups[0]["update_k"])

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Average the squared gradients into h, of the parameters that have one; nothing moves and no step counts."""
        for group in self.param_groups:
            beta2, members = group["betas"][1], [p for p in group["params"] if p.grad is not None]
            for p in members:
                if not self.state[p]:
                    zeros = {slot: torch.zeros_like(p, memory_format=torch.preserve_format) for slot in self.slots}
                    self.state[p].update(step=0, **zeros)
            if members:
                estimates = [self.state[p]["h"] for p in members]
                average_squares(estimates, [p.grad for p in members if p.grad is not None], beta2)

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, bs: float | Tensor | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            bs: terms averaged in the loss of the last Hessian estimate; a number, or a 0-dim tensor on the parameters'
                device, which is not waited for. None takes the constructor's.
        """
        if bs is not None and not isinstance(bs, Tensor) and not bs > 0:
            raise FrankensteinError(f"sophia: bs: found {bs!r}: expected a number above 0")
        self._bs = float(bs) if isinstance(bs, Tensor) and bs.is_cpu else bs
        try:
            return super().step(closure)
        finally:
            self._bs = None

    def move(self, group: Group, step: int, lists: Lists) -> None:
        (m, h), lr = lists.state, group["lr"]
        decay(lists.params, lr * group["weight_decay"])
        average(m, lists.grads, group["betas"][0])
        scale = group["rho"] * (group["bs"] if self._bs is None else self._bs)
        if isinstance(scale, Tensor):  # torch._foreach_mul is fast for a factor of the tensors' own type
            scale = scale.to(lists.params[0])
        bounds = torch._foreach_mul(h, scale)
        torch._foreach_add_(bounds, _FLOOR)
        updates = torch._foreach_div(m, bounds)
        torch._foreach_clamp_max_(updates, 1)
        torch._foreach_clamp_min_(updates, -1)
        torch._foreach_add_(lists.params, updates, alpha=-lr)
