"""GaLore: gradients projected to a low rank before another optimizer sees them.

    R_t = P^T G_t (or G_t P^T);  W <- W + scale P rho_t(R_t), then the decay of W        rho_t: the wrapped step
Source: Zhao et al. 2024, definition 3.4 and algorithm 1, https://arxiv.org/abs/2403.03507. P holds the first singular
vectors of the gradient at a refresh, on the side of the smaller dimension, and serves until the next refresh; the
wrapped method's state is not changed at a refresh, as in the authors' code.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.contract import FAMILIES, contract
from frankenstein.optimizers.factors import dense_gradient

WRAPPED = (
    "sgd_momentum",
    "adamw",
    "adafactor",
    "lion",
    "muon",
    "turbo_muon",
    "radam",
    "adan",
    "adopt",
    "ademamix",
    "mars_adamw",
    "cautious_adamw",
)
REFUSED = {
    "galore_adamw": "it projects its gradients itself; set galore_adamw-rank instead",
    "prodigy": "its step size is estimated from the distance that the parameters have moved",
    "sophia": "its Hessian estimate comes from further gradients, between the steps",
    "lamb": "its step is scaled by the norm of the parameter and holds the weight decay",
    "schedulefree_adamw": "it steps from an average of the parameters",
    "shampoo": "its factors belong to fixed coordinates and are larger than the state that projection saves",
    "soap": "its eigenbases belong to fixed coordinates and are larger than the state that projection saves",
    "softsignum": "its temperatures come from the statistics of whole gradients",
    "softmuon": "its temperatures come from the singular values of whole gradients",
}
_OWN_STATE = ("galore_step", "projection")
_EXCLUDED = "embeddings"  # the published recipe projects attention and feed-forward matrices


def projection(gradient: Tensor, rank: int) -> Tensor:
    """The first singular vectors of a gradient (m, n): (rank, n) right ones for m >= n, else (m, rank) left ones.

    Computed in float32 whatever the gradient's type; a rank above the smaller dimension is cut to that.
    """
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors = right[:rank] if gradient.shape[0] >= gradient.shape[1] else left[:, :rank]
    return vectors.to(gradient.dtype).clone(memory_format=torch.contiguous_format)


def project(gradient: Tensor, vectors: Tensor) -> Tensor:
    """(m, n) -> (m, rank) for m >= n, else (rank, n)."""
    return gradient @ vectors.mT if gradient.shape[0] >= gradient.shape[1] else vectors.mT @ gradient


def add_back(parameter: Tensor, low_rank: Tensor, vectors: Tensor, factor: float) -> None:
    """parameter <- parameter + factor * the projected tensor taken back to (m, n), in place."""
    pair = (low_rank, vectors) if parameter.shape[0] >= parameter.shape[1] else (vectors, low_rank)
    parameter.addmm_(*pair, alpha=factor)


def refusal(name: str) -> str | None:
    """Why GaLore cannot wrap an optimizer; None where it can."""
    if name in REFUSED:
        return f"use_galore: {name} cannot be wrapped: {REFUSED[name]}; {_known()}"
    return None if name in WRAPPED else f"use_galore: nothing says that {name} can be wrapped; {_known()}"


def check_wrapped(name: str) -> None:
    """Raise FrankensteinError, with the reason, for an optimizer that GaLore cannot wrap."""
    reason = refusal(name)
    if reason is not None:
        raise FrankensteinError(reason)


def _known() -> str:
    return f"GaLore wraps {', '.join(WRAPPED)}"


class GaLore(Optimizer):
    """Any of WRAPPED with GaLore around it: every large matrix is stepped through a proxy of its projected size.

    Projected are 2-D parameters with both dimensions above `rank` and none above `max_dim`, except in the group named
    "embeddings" and in groups with matrix=False. The wrapped optimizer holds a zero proxy for each, steps it by the
    projected gradient, and the proxy's movement, taken back, is what the parameter moves by. The parameter's own decay
    follows: (1 - lr wd) theta, for adan theta / (1 + lr wd); sgd_momentum's L2 term is part of the gradient before the
    projection. Two methods scale a step by the parameter: adafactor (root mean square) and the muons (shape), and the
    proxy's movement is rescaled to that. All other parameters are the wrapped optimizer's as they are.
    adan and mars_adamw take the difference of two gradients; at a refresh these lie in two subspaces.

    Args:
        name: of the wrapped optimizer.
        groups: parameter groups, as that optimizer takes them; `param_groups` shows them whole, and what a scheduler
            sets there (lr, betas, ...) reaches the wrapped optimizer at the next step.
        arguments: constructor arguments for all groups.
        rank, update_interval, scale, max_dim: training.galore_*; a refresh comes every update_interval steps of a
            parameter, the first included.
    Raises:
        FrankensteinError: for an optimizer that cannot be wrapped, a senseless value, or when nothing is projected.
    """

    def __init__(
        self,
        name: str,
        groups: Iterable[dict[str, Any]],
        arguments: Mapping[str, Any],
        *,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        max_dim: int = 4096,
    ) -> None:
        check_wrapped(name)
        self._settings: dict[str, Any] = dict(rank=rank, update_interval=update_interval, scale=scale, max_dim=max_dim)
        _check_settings(self._settings)
        self._name, self._arguments = name, dict(arguments)
        self._synced = (*(FAMILIES[family] for family in contract(name).families), *contract(name).own)
        self._inner: Optimizer | None = None
        self._parts: list[tuple[int, bool]] = []  # of each group of the wrapped optimizer: group here, projected?
        self._proxies: dict[nn.Parameter, nn.Parameter] = {}
        super().__init__(list(groups), {})
        self.defaults = dict(self.inner.defaults)
        if not self._proxies:
            raise FrankensteinError(
                f"use_galore: no matrix has both dimensions above galore_rank={rank} and none above "
                f"galore_max_dim={max_dim}; the group {_EXCLUDED} is never projected"
            )

    @property
    def inner(self) -> Optimizer:
        """The wrapped optimizer."""
        assert self._inner is not None
        return self._inner

    @property
    def projected(self) -> list[nn.Parameter]:
        """The parameters that are stepped through a projection."""
        return list(self._proxies)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        members = param_group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        matrices = [p for p in members if self._projects(p, param_group)]
        chosen = set(matrices)
        proxies = {p: nn.Parameter(p.new_zeros(_low_rank_shape(p, self._settings["rank"]))) for p in matrices}
        self._proxies.update(proxies)
        index, values = len(self.param_groups), {}
        for projected, part in ((True, list(proxies.values())), (False, [p for p in members if p not in chosen])):
            if part:
                values = self._add_inner({**param_group, "params": part})
                self._parts.append((index, projected))
        super().add_param_group({**values, **param_group, "params": members})

    def _add_inner(self, group: dict[str, Any]) -> dict[str, Any]:
        """Give the wrapped optimizer a group; returns the group with every value that it has."""
        if self._inner is None:
            self._inner = OPTIMIZERS[self._name]([group], **self._arguments)
        else:
            self._inner.add_param_group(group)
        return self._inner.param_groups[-1]

    def _projects(self, p: nn.Parameter, group: Mapping[str, Any]) -> bool:
        values = {**self._arguments, **group}
        if values.get("name") == _EXCLUDED or not values.get("matrix", True) or p.ndim != 2:
            return False
        return min(p.shape) > self._settings["rank"] and max(p.shape) <= self._settings["max_dim"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients are only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pass_on_values()
        moving = [
            (group, p, self._proxies[p])
            for group in self.param_groups
            for p in group["params"]
            if p in self._proxies and p.grad is not None
        ]
        for group, p, proxy in moving:
            proxy.grad = self._projected_gradient(group, p)
        self.inner.step()
        self._show_state()
        for group, p, proxy in moving:
            if self._name in _RESCALED:
                _RESCALED[self._name](group, p, proxy)
            add_back(p, proxy, self.state[p]["projection"], self._settings["scale"])
            self._decay(group, p)
            proxy.zero_()
            proxy.grad = None
        return loss

    def _pass_on_values(self) -> None:
        """Learning rates and the like, as they are set in `param_groups` now; proxies do not decay."""
        for (index, projected), inner in zip(self._parts, self.inner.param_groups, strict=True):
            group = self.param_groups[index]
            inner.update({key: group[key] for key in self._synced if key in group})
            if projected:
                inner["weight_decay"] = 0.0

    def _projected_gradient(self, group: dict[str, Any], p: nn.Parameter) -> Tensor:
        gradient, state = dense_gradient(self._name, p), self.state[p]
        if self._name == "sgd_momentum" and group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        step = state.setdefault("galore_step", 0)
        if step % self._settings["update_interval"] == 0:
            state["projection"] = projection(gradient, self._settings["rank"])
        state["galore_step"] = step + 1
        return project(gradient, state["projection"])

    def _decay(self, group: dict[str, Any], p: nn.Parameter) -> None:
        rate = group["lr"] * group["weight_decay"]
        if self._name == "adopt" and self.state[p]["galore_step"] == 1:
            return  # its first step does nothing but start the second moment
        if rate and self._name == "adan":
            p.div_(1 + rate)
        elif rate and self._name != "sgd_momentum":
            p.mul_(1 - rate)

    def state_dict(self) -> dict[str, Any]:
        """torch's layout; the state of a parameter is the wrapped method's and, if projected, the projection."""
        return {**super().state_dict(), "galore": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; FrankensteinError if that was written without GaLore or for other matrices."""
        found = state_dict.get("galore")
        if found != self._identity():
            raise FrankensteinError(
                f"use_galore: the saved optimizer has galore={found}; expected {self._identity()} as configured"
            )
        super().load_state_dict(state_dict)
        saved_groups, saved = state_dict["param_groups"], state_dict["state"]
        numbers = [number for group in saved_groups for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        number_of = {self._proxies.get(p, p): number for number, p in zip(numbers, parameters, strict=True)}
        groups, state, count = [], {}, 0
        for (index, _), group in zip(self._parts, self.inner.param_groups, strict=True):
            own = range(count, count + len(group["params"]))
            groups.append({**saved_groups[index], "params": list(own)})
            for i, q in zip(own, group["params"], strict=True):
                if number_of[q] in saved:
                    state[i] = {key: value for key, value in saved[number_of[q]].items() if key not in _OWN_STATE}
            count += len(own)
        self.inner.load_state_dict({"param_groups": groups, "state": state})
        self._show_state()

    def _show_state(self) -> None:
        """The wrapped method's state of every parameter, also here: the same tensors."""
        for p in (p for group in self.param_groups for p in group["params"]):
            inner = self._proxies.get(p, p)
            if inner in self.inner.state:
                self.state[p].update(self.inner.state[inner])

    def _identity(self) -> dict[str, Any]:
        """What a saved state must agree on."""
        return {"optimizer": self._name, "rank": self._settings["rank"], "max_dim": self._settings["max_dim"]}


def _check_settings(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if key == "scale":
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not number:
            expected = "a finite number of at least 0" if key == "scale" else "an integer of at least 1"
            raise FrankensteinError(f"galore_{key}: found {value!r}; expected {expected}")


def _low_rank_shape(p: Tensor, rank: int) -> tuple[int, int]:
    rows, columns = p.shape
    return (rows, rank) if rows >= columns else (rank, columns)


def _to_root_mean_square(group: Mapping[str, Any], p: Tensor, proxy: Tensor) -> None:
    """adafactor steps by max(eps2, RMS(theta)); of the zero proxy that is eps2."""
    norm = torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
    proxy.mul_((norm / p.numel() ** 0.5).clamp_(min=group["eps2"]) / group["eps2"])


def _to_shape(group: Mapping[str, Any], p: Tensor, proxy: Tensor) -> None:
    """The muons step by sqrt(max(1, rows / columns)); "match_rms_adamw" has the same value for both shapes."""
    if group.get("adjust_lr_fn", "original") == "original":
        wanted, had = (max(1.0, t.shape[0] / t.shape[1]) for t in (p, proxy))
        proxy.mul_((wanted / had) ** 0.5)


_RESCALED = {"adafactor": _to_root_mean_square, "muon": _to_shape, "turbo_muon": _to_shape}
