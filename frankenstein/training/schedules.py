"""Learning-rate schedules, as pure functions of the step.

Source: cosine decay: Loshchilov & Hutter 2017, eq. 5 without restarts, https://arxiv.org/abs/1608.03983.
"""

import math

from frankenstein.errors import FrankensteinError


def lr_factor(step: int, *, total_steps: int, warmup_ratio: float, kind: str) -> float:
    """Factor of the base learning rate at a step; the warm-up takes int(total_steps * warmup_ratio) steps.

    During the warm-up it rises linearly and reaches 1 on its last step. After it cosine falls to 0 at `total_steps`,
    and linear_warmup_then_constant stays at 1. constant has no warm-up.
    Args:
        step: counts from 0; steps from `total_steps` on take the last value.
        warmup_ratio: 0-1.
    """
    if kind == "constant":
        return 1.0
    warmup = int(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if kind == "linear_warmup_then_constant":
        return 1.0
    if kind != "cosine":
        raise FrankensteinError(f"scheduler_type {kind!r}: expected cosine, constant or linear_warmup_then_constant")
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))
