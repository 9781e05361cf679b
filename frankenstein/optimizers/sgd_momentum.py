"""Stochastic gradient descent with momentum.

    g <- g + wd theta;  buf <- mu buf + g (first: g);  theta <- theta - lr buf, or with nesterov theta - lr (g + mu buf)
Source: Sutskever et al. 2013, section 2, https://proceedings.mlr.press/v28/sutskever13.html; torch.optim.SGD.
"""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS, check_group
from frankenstein.optimizers.contract import check_arguments


@OPTIMIZERS.register("sgd_momentum")
class SGDMomentum(torch.optim.SGD):
    """torch's SGD; weight decay is added to the gradient (L2). Arguments are checked, also per group."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        arguments = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        check_arguments("sgd_momentum", arguments)
        _check_nesterov(arguments)
        # Not fused: torch 2.13's fused CPU kernel leaves most bfloat16 and float16 parameters where they are.
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_group("sgd_momentum", param_group)
        _check_nesterov({**self.defaults, **param_group})
        super().add_param_group(param_group)


def _check_nesterov(arguments: dict[str, Any]) -> None:
    if arguments["nesterov"] and arguments["momentum"] == 0:
        raise FrankensteinError("sgd_momentum: nesterov=True needs a momentum above 0")
