"""Turbo-Muon: Muon with the rows of U rescaled instead of its norm, and better coefficients: one iteration less.

    A = U U^T;  s_i = max(sum_j |A_ij|, ns_eps)^(-1/2);  X = diag(s) U, A <- diag(s) A diag(s)         ||X||_2 <= 1
    ns_steps times  X <- a X + (b A + c A A) X,  A = X X^T, with the last ns_steps of five triples (a, b, c)
    theta <- (1 - lr wd) theta - lr sqrt(max(1, rows / columns)) X                    (U: see matrix_method.py)
Source: Boissin et al. 2025, https://arxiv.org/abs/2512.04632; https://github.com/thib-s/flash-newton-schulz.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.matrix_method import MatrixMethod, symmetric_product
from frankenstein.optimizers.muon import newton_schulz

_TRIPLES = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalize(X: Tensor, *, steps: int, eps: float, exact: bool) -> Tensor:
    """Turbo-Muon's map of a stack of matrices.

    A matrix whose rows are shorter than sqrt(eps) is not scaled up to norm 1, so its result shrinks with it.
    Args:
        X: (n, r, c), r <= c; overwritten.
        steps: at most 5.
        exact: see newton_schulz.
    Returns:  (n, r, c).
    """
    A = symmetric_product(X, X.mT)
    scale = A.abs().sum(-1, keepdim=True, dtype=torch.float32).clamp_min(eps).rsqrt()
    return newton_schulz(X.mul_(scale), A.mul_(scale).mul_(scale.mT), _TRIPLES[-steps:], exact=exact)


@OPTIMIZERS.register("turbo_muon")
class TurboMuon(MatrixMethod):
    """Turbo-Muon for the hidden matrices, AdamW inside for all else (see MatrixMethod).

    lr is in units of spectral norm a step. ns_dtype "bfloat16" means float32 on a CPU without bfloat16 products.
    Raises:
        FrankensteinError: for ns_steps above 5, since there are five triples (the published code takes 5 silently).
    """

    name = "turbo_muon"

    def __init__(  # noqa: PLR0913  the method's hyperparameters, keyword only
        self,
        params: ParamsT,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 4,
        ns_eps: float = 1e-6,
        ns_dtype: str = "bfloat16",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        fallback_lr_ratio: float = 0.015,
        matrix: bool = True,
    ) -> None:
        arguments = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_eps": ns_eps,
            "ns_dtype": ns_dtype,
            "betas": betas,
            "eps": eps,
            "fallback_lr_ratio": fallback_lr_ratio,
            "matrix": matrix,
        }
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        steps = {**self.defaults, **param_group}["ns_steps"]
        if steps > len(_TRIPLES):
            raise FrankensteinError(f"turbo_muon: ns_steps: found {steps}: expected at most {len(_TRIPLES)}")
        super().add_param_group(param_group)

    def orthogonalize(self, group: dict[str, Any], X: Tensor) -> Tensor:
        exact = group["ns_dtype"] == "float32"
        return orthogonalize(X, steps=group["ns_steps"], eps=group["ns_eps"], exact=exact)
