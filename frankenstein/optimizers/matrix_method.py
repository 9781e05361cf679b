"""Base of the optimizers for hidden matrices, with AdamW in the same object for every other parameter.

    B <- lerp(B, g, 1 - mu);  U = lerp(g, B, mu) with nesterov, else B
    theta <- (1 - lr wd) theta;  theta <- theta - lr adjustment(d0, d1) O(U)
Each method gives O, a function of the singular values of U: (d0, d1), more dimensions flattened to (d0, rest).
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (matrices to Muon, the rest to AdamW).
"""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from frankenstein.optimizers.base import Method

_STACK = 2**26  # elements of matrices worked on together: bounds the temporary memory
_CPU_STACK = 2**19  # on a CPU: so many stay in its cache, and larger matrices gain nothing from a batch (measured)
_STRIP = 128  # rows of a strip of a symmetric product; 96 and 192 are slower (measured)
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")  # torch.cpu.get_capabilities: x86, x86, ARM


def iteration_dtype(ns_dtype: str, device: torch.device) -> torch.dtype:
    """The number type to iterate in: `ns_dtype`, but float32 for bfloat16 on a CPU that does not multiply it itself.

    There bfloat16 products are emulated: 9 times slower than float32, and less exact.
    """
    emulated = device.type == "cpu" and not any(torch.cpu.get_capabilities().get(unit) for unit in _BFLOAT16_UNITS)
    return torch.bfloat16 if ns_dtype == "bfloat16" and not emulated else torch.float32


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b where that is known to be symmetric; large ones on a CPU by strips on and right of the diagonal, mirrored.

    At 768 rows the strips take 0.58 of the arithmetic and 0.6 of the time.
    Args:
        a, b: (..., R, C) and (..., C, R).
    Returns:  (..., R, R).
    """
    rows = a.shape[-2]
    if a.device.type != "cpu" or a.dtype != torch.float32 or rows < 4 * _STRIP:
        return a @ b
    product = a.new_empty(*a.shape[:-1], rows)
    for start in range(0, rows, _STRIP):
        end = min(start + _STRIP, rows)
        product[..., start:end, start:] = a[..., start:end, :] @ b[..., start:]
        product[..., end:, start:end] = product[..., start:end, end:].mT
    return product


class MatrixMethod(Method):
    """A method for parameters with two or more dimensions in groups with `matrix` true (the default).

    Every other parameter takes AdamW with the group's betas, eps and weight_decay: vectors and scalars of such a group
    with fallback_lr_ratio times its lr, all parameters of a group with `matrix` false (embeddings, output head) with
    its lr. Equal shapes are worked on together.
    """

    flags = ("matrix",)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        matrices = [p for p in members if self.takes(group, p)]
        others = [p for p in members if not self.takes(group, p)]
        for stack in stacks(matrices):
            self._move(group, stack)
        ratio = group["fallback_lr_ratio"] if group["matrix"] else 1.0
        # The fused kernel reads memory in order, whatever the strides; on a CPU without a check.
        for dense in (True, False):
            part = [p for p in others if _dense(p) is dense]
            if part:
                self._adamw(group, part, group["lr"] * ratio, fused=dense)

    @staticmethod
    def takes(group: dict[str, Any], p: Tensor) -> bool:
        """Whether the method itself, not AdamW, moves the parameter."""
        return group["matrix"] and p.ndim >= 2

    @abstractmethod
    def orthogonalize(self, group: dict[str, Any], X: Tensor) -> Tensor:
        """O(X); X: (n, r, c), r <= c, in the iteration's number type, may be overwritten. Returns (n, r, c)."""

    def adjustment(self, group: dict[str, Any], rows: int, columns: int) -> float:
        """Factor of lr for the step (not for the decay): tall matrices step by more, sqrt(max(1, rows / columns))."""
        return math.sqrt(max(1, rows / columns))

    def _move(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        """One step of matrices of equal shape, dtype and device."""
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in members if p.grad is not None]
        for p in members:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in members]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        directions = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        U = torch.stack([direction.flatten(1) for direction in directions])
        _, rows, columns = U.shape
        X = (U.mT if rows > columns else U).to(iteration_dtype(group["ns_dtype"], U.device))
        O = self.orthogonalize(group, X)
        steps = [o.reshape(p.shape) for o, p in zip(O.mT if rows > columns else O, members, strict=True)]
        params: list[Tensor] = list(members)
        if lr * group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, steps, alpha=-lr * self.adjustment(group, rows, columns))

    def _adamw(self, group: dict[str, Any], members: list[nn.Parameter], lr: float, *, fused: bool) -> None:
        for p in members:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros((), device=p.device))
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] = state["step"].to(p.device)  # a loaded state has it where the file put it
        states = [self.state[p] for p in members]
        adamw(
            list(members),
            [p.grad for p in members if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def stacks(matrices: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in lists of equal (flattened) shape, dtype and device, of bounded size."""
    buckets: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for p in matrices:
        buckets[p.shape[0], p.numel(), p.dtype, p.device].append(p)
    for (_, numel, _, device), bucket in buckets.items():
        size = max(1, (_CPU_STACK if device.type == "cpu" else _STACK) // numel)
        yield from (bucket[i : i + size] for i in range(0, len(bucket), size))


def _dense(p: nn.Parameter) -> bool:
    return p.is_contiguous() and p.grad is not None and p.grad.is_contiguous()
