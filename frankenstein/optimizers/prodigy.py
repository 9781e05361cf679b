"""Prodigy: Adam with a step size that grows to the estimated distance from the start to the solution.

    dlr = d lr c,  c = 1 or, with bias correction, sqrt(1 - b2^t) / (1 - b1^t);  b3 = sqrt(b2)
    r <- b3 r + (d/d0) dlr <g, theta_0 - theta>;  s <- b3 s + (d/d0) dlr g  (safeguard_warmup: (d/d0) d g)
    m <- b1 m + (1 - b1) d g;  v <- b2 v + (1 - b2) d^2 g^2
    dhat = d_coef r / ||s||_1;  in the first phase (d = d0): d <- max(d, dhat)
    d_max <- max(d_max, dhat);  d_new = min(d_max, growth_rate d)
    theta <- theta - dlr (wd theta + m / (sqrt(v) + d_new eps))
Source: Mishchenko & Defazio 2023, algorithm 4, https://arxiv.org/abs/2306.06101; d/d0 and the rules for d as in the
authors' implementation. Where we differ: r, s and d are found with the largest lr and b2 of all groups, and each group
steps with its own (theirs refuses unequal lr); a parameter without gradient still counts in ||s||_1; no value is
waited for. A group with lr 0 takes no part in a step.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.elementwise import Cluster, Elementwise, Group, Lists, Tensors

Factor = float | Tensor


@OPTIMIZERS.register("prodigy")
class Prodigy(Elementwise):
    """Prodigy; four state tensors a parameter, among them its start. Leave lr at 1 and schedule it from there.

    `group["d"]` is the estimate, a 0-dim float64 tensor that all groups share. It grows once parameters have moved:
    where they are bfloat16, d0 has to be large enough to move them (1e-6 is not).
    Args:
        lr: factor of d; groups may differ.
        d0: first estimate. d_coef: factor of the estimate. growth_rate: its largest growth in a step.
            These three are the same in all groups.
        use_bias_correction: Adam's.
        safeguard_warmup: keep a warm-up of lr out of s.
    Raises:
        FrankensteinError: for an unknown argument, a senseless value, or groups with unequal d0, d_coef, growth_rate.
    """

    name = "prodigy"
    slots = ("m", "v", "s", "start")
    # Within one call of step: what has to move, and of its parts (d/d0) dlr <g, theta_0 - theta> and ||s||_1.
    _observed: list[tuple[dict[str, Any], int, list[Cluster]]]
    _products: list[Tensor]
    _norms: list[Tensor]

    def __init__(  # noqa: PLR0913  one keyword for each argument of the contract
        self,
        params: ParamsT,
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
    ) -> None:
        arguments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        common = {"d0": d0, "d_coef": d_coef, "growth_rate": growth_rate}
        switches = {"use_bias_correction": use_bias_correction, "safeguard_warmup": safeguard_warmup}
        super().__init__(params, {**arguments, **common, **switches})

    def _check(self, arguments: Mapping[str, Any]) -> None:
        unbounded = arguments.get("growth_rate") == math.inf  # the default; elsewhere infinity is an error
        super()._check({k: v for k, v in arguments.items() if not (unbounded and k == "growth_rate")})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = {**self.defaults, **param_group}
        first = self.param_groups[0] if self.param_groups else given
        for name in ("d0", "d_coef", "growth_rate"):
            if given[name] != first[name]:
                raise FrankensteinError(f"prodigy: {name}: found {given[name]}: expected {first[name]} in all groups")
        super().add_param_group(param_group)
        d0 = torch.tensor(first["d0"], dtype=torch.float64)
        start = {"d": d0, "d_max": d0, "r": torch.zeros_like(d0)}
        self.param_groups[-1].update({name: first.get(name, value) for name, value in start.items()})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; all are observed before the first one moves."""
        self._observed, self._products, self._norms = [], [], []
        loss = super().step(closure)
        if self._observed:
            with torch.no_grad():
                self._finish()
        self._observed, self._products, self._norms = [], [], []
        return loss

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        if group["lr"] == 0:
            return
        for p in members:
            state = self.state[p]
            if not state:
                zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in self.slots[:3]}
                state.update(step=0, **zeros, start=p.detach().clone())
        self.advance(group, members, self.slots, self.work)

    def work(self, group: Group, step: int, clusters: list[Cluster]) -> None:
        """Update m, v and s; keep what has to move, and its shares of r and ||s||_1."""
        if not clusters:
            return
        (beta1, beta2), d = group["betas"], _known(group["d"], clusters)
        correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["use_bias_correction"] else 1.0
        scale = d / group["d0"] * d
        largest = scale * (max(g["lr"] for g in self.param_groups) * correction)
        known = {
            "d": d,
            "weight_r": largest,
            "weight_s": scale if group["safeguard_warmup"] else largest,
            "beta3": self._beta3(),
            "dlr": d * (group["lr"] * correction),
        }
        super().work({**group, **known}, step, clusters)
        self._observed.append(({**group, **known}, step, clusters))

    def _finish(self) -> None:
        """Find the new d and move what was observed, with the old one in its step size."""
        d = self._estimate()
        for group, step, clusters in self._observed:
            super().work({**group, "d_new": _known(d, clusters)}, step, clusters)

    def move(self, group: Group, step: int, lists: Lists) -> None:
        if "d_new" not in group:
            self._observe(group, lists)
            return
        (m, v), params, dlr = lists.state[:2], lists.params, group["dlr"]
        denominators = _roots(v, group["d_new"] * group["eps"])
        if group["weight_decay"] != 0:
            _add(params, params, -group["weight_decay"] * dlr)
        _add_quotients(params, m, denominators, -dlr)

    def _observe(self, group: Group, lists: Lists) -> None:
        (m, v, s, start), grads, d = lists.state, lists.grads, group["d"]
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(m, beta1)
        _add(m, grads, d * (1 - beta1))
        torch._foreach_mul_(v, beta2)
        _add_products(v, grads, grads, d * d * (1 - beta2))
        torch._foreach_mul_(s, group["beta3"])
        _add(s, grads, group["weight_s"])
        moved = torch._foreach_sub(start, lists.params)
        self._products.append(_inner_products(grads, moved) * group["weight_r"])
        self._norms.append(_absolute_sums(s, moved))

    def _estimate(self) -> Tensor:
        """The new d; it, r and d_max go into all groups."""
        first, device = self.param_groups[0], self._norms[0].device
        d, d_max, r = (first[name].to(device) for name in ("d", "d_max", "r"))
        r = self._beta3() * r + _sum(self._products, device)
        norm = _sum([*self._norms, *self._idle_norms()], device)
        estimate = torch.where(norm > 0, first["d_coef"] * r / norm, d)  # no gradient yet: d stays
        grown = torch.where(d == first["d0"], torch.maximum(d, estimate), d)
        d_max = torch.maximum(d_max, estimate)
        d = torch.minimum(d_max, grown * (math.inf if first["growth_rate"] is None else first["growth_rate"]))
        for group in self.param_groups:
            group.update(d=d, d_max=d_max, r=r)
        return d

    def _idle_norms(self) -> list[Tensor]:
        """||s||_1 of parameters that miss their gradient in this step and had one before."""
        members = [p for group in self.param_groups if group["lr"] != 0 for p in group["params"] if p.grad is None]
        idle = [self.state[p]["s"] for p in members if self.state.get(p)]
        return [_absolute_sums([s], [torch.empty_like(s)]) for s in idle]

    def _beta3(self) -> float:
        return math.sqrt(max(group["betas"][1] for group in self.param_groups))


def _known(value: Tensor, clusters: list[Cluster]) -> Factor:
    """A 0-dim tensor as a number where the clusters are on a CPU; elsewhere it stays on the device."""
    device = clusters[0].calls[0].params[0].device
    return float(value) if device.type == "cpu" else value.to(device)


def _add(a: Tensors, x: Tensors, factor: Factor) -> None:
    """a <- a + factor x."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(a, torch._foreach_mul(x, factor.to(a[0].dtype)))
    else:
        torch._foreach_add_(a, x, alpha=factor)


def _add_products(a: Tensors, x: Tensors, y: Tensors, factor: Factor) -> None:
    """a <- a + factor x y."""
    if isinstance(factor, Tensor):
        torch._foreach_addcmul_(a, torch._foreach_mul(x, factor.to(a[0].dtype)), y)
    else:
        torch._foreach_addcmul_(a, x, y, factor)


def _add_quotients(a: Tensors, x: Tensors, y: Tensors, factor: Factor) -> None:
    """a <- a + factor x / y."""
    if isinstance(factor, Tensor):
        torch._foreach_addcdiv_(a, torch._foreach_mul(x, factor.to(a[0].dtype)), y)
    else:
        torch._foreach_addcdiv_(a, x, y, factor)


def _roots(squares: Tensors, eps: Factor) -> Tensors:
    """sqrt(v) + eps, as new tensors."""
    result = torch._foreach_sqrt(squares)
    if isinstance(eps, Tensor):
        for root in result:
            root.add_(eps.to(root.dtype))
    else:
        torch._foreach_add_(result, eps)
    return result


def _inner_products(a: Tensors, b: Tensors) -> Tensor:
    exact = torch.promote_types(a[0].dtype, torch.float32)
    return torch.stack([x.flatten().to(exact) @ y.flatten().to(exact) for x, y in zip(a, b, strict=True)]).double()


def _absolute_sums(tensors: Tensors, scratch: Tensors) -> Tensor:
    """Sums of |x|, of each tensor; scratch has their shapes and may be overwritten."""
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    if tensors[0].is_cpu:  # a quarter of the time of the norm
        sums = [torch.abs(x, out=free).sum(dtype=exact) for x, free in zip(tensors, scratch, strict=True)]
    else:
        sums = list(torch._foreach_norm(tensors, 1, exact))
    return torch.stack(sums).double()


def _sum(parts: list[Tensor], device: torch.device) -> Tensor:
    """Sum of all entries; sorted, so that it does not depend on how parameters are grouped."""
    return torch.cat([part.to(device) for part in parts]).sort().values.sum()
