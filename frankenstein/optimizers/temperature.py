"""The temperature schedule of SoftSignum and SoftMuon: when and how fast sign-like steps become proportional ones.

    m = median(x), s = median(|x - m|);  p_k = k / transition_steps, k = 0, 1, ...
    q_k: C((q - m) / s) - C((-q - m) / s) = p_k, C the standard Cauchy distribution function, so q_k is the
    p_k-quantile of |x| for x ~ Cauchy(m, s);  T_k = clamp(saturation / q_k, 1, t_max)
At T_k the share 1 - p_k of the values is still saturated; T falls with k.
Source: Feoktistov et al. 2026, algorithm 1, https://arxiv.org/abs/2605.31371. Where we differ: the last temperature is
held after transition_steps, where the published SoftSignum ends with an IndexError.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import Method

_OFFSET = 1e-8  # added to s in the distribution's arguments, as published


def switch_steps(alpha_sign: float, total_steps: int) -> tuple[int, int]:
    """(sign_steps, transition_steps) of a run of `total_steps` whose share alpha_sign comes before the softening."""
    sign_steps = round(alpha_sign * total_steps)
    return sign_steps, max(1, total_steps - sign_steps)


def temperatures(x: Tensor, saturation: float, *, steps: int, newton_steps: int, t_max: float) -> Tensor:
    """The schedule for values distributed as x.

    Args:
        x: (n,), may be empty; half precision is widened.
        saturation: the argument at which the method's soft sign counts as saturated.
    Returns:  (steps,), float64, on the CPU, so that reading one waits for no device. All t_max where s = 0: half of
        the values are equal, and no quantile can be told from 0.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    m = x.median().item() if x.numel() else 0.0
    s = (x - m).abs_().median().item() if x.numel() else 0.0
    if s == 0:
        return torch.full((steps,), t_max, dtype=torch.float64)
    quantiles = folded_cauchy_quantiles(m, s, steps, newton_steps)
    return (saturation / quantiles).clamp_(1.0, t_max)


def folded_cauchy_quantiles(m: float, s: float, steps: int, newton_steps: int) -> Tensor:
    """q_0, .., q_{steps - 1} by Newton's method from s tan(pi p / 2) + |m|, kept >= 0. float64."""
    p = torch.arange(steps, dtype=torch.float64) / steps
    q = s * torch.tan(math.pi / 2 * p) + abs(m)
    for _ in range(newton_steps):
        upper, lower = (q - m) / (s + _OFFSET), (-q - m) / (s + _OFFSET)
        excess = (torch.atan(upper) - torch.atan(lower)) / math.pi - p
        density = (1 / (1 + upper.square()) + 1 / (1 + lower.square())) / (math.pi * s)
        q = (q - excess / density).clamp_min_(0.0)
    return q


class Softening(Method):
    """A method that softens: one count of steps for the whole optimizer, and a schedule for every group.

    A group carries "step", the steps done (by all groups, with or without gradients), and "schedule", None until the
    first softened step, then (transition_steps,). A group added later counts from where the others are.
    Raises:
        FrankensteinError: for sign_steps without transition_steps, and for alpha_sign, which is a share of a run that
            the optimizer does not know: `switch_steps` turns it into these two.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "alpha_sign" in param_group:
            raise FrankensteinError(
                f"{self.name}: alpha_sign: found in a parameter group: expected sign_steps and transition_steps"
            )
        merged = {**self.defaults, **param_group}
        if merged["sign_steps"] is not None and merged["transition_steps"] is None:
            raise FrankensteinError(
                f"{self.name}: transition_steps: found none beside sign_steps={merged['sign_steps']}: expected both"
            )
        super().add_param_group(param_group)
        self.param_groups[-1].update(step=self.param_groups[0].get("step", 0), schedule=None)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            group["step"] += 1
        return loss

    @staticmethod
    def softened(group: Mapping[str, Any]) -> bool:
        """Whether the step that is being made comes after the group's sign_steps."""
        return group["sign_steps"] is not None and group["step"] >= group["sign_steps"]

    def start(self, group: dict[str, Any], x: Tensor, saturation: float) -> None:
        """Set the group's schedule from the values of its first softened step."""
        group["schedule"] = temperatures(
            x,
            saturation,
            steps=group["transition_steps"],
            newton_steps=group["newton_steps"],
            t_max=group["t_max"],
        )

    def temperature(self, group: Mapping[str, Any]) -> float | None:
        """T of the step that is being made; None before the softening."""
        if not self.softened(group):
            return None
        schedule = group["schedule"]
        return float(schedule[min(group["step"] - group["sign_steps"], len(schedule) - 1)])
