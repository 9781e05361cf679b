"""SoftMuon: Muon, whose equal singular values a falling temperature turns back into proportional ones.

    t <= sign_steps, or sign_steps None: Muon
    later: theta <- (1 - lr wd) theta - lr sqrt(max(1, rows / columns)) O,  O = (U U^T + I / T_k^2)^(-1/2) U
so a singular value sigma of U becomes T sigma / sqrt(1 + T^2 sigma^2). The root by ns_steps coupled Newton-Schulz steps
    Y = A / ||A||_F, Z = I;  W = (3 I - Z Y) / 2, Y <- Y W, Z <- W Z;  A^(-1/2) ~ Z / sqrt(||A||_F)
T is built once per group from the singular values of the gradients of all its matrices at t = sign_steps + 1, see
temperature.py; its saturation is y / sqrt(1 - y^2), y = 1 - sat_eps.
Source: Feoktistov et al. 2026, https://arxiv.org/abs/2605.31371; https://github.com/brain-lab-research/softsign. The 5
steps of the published optimizer leave its root up to 30 % short where T is large; 10 leave 0.3 %.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers import muon
from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.matrix_method import MatrixMethod, stacks, symmetric_product
from frankenstein.optimizers.temperature import Softening


def soften(X: Tensor, T: float, *, steps: int) -> Tensor:
    """(X X^T + I / T^2)^(-1/2) X by coupled Newton-Schulz iteration.

    Args:
        X: (n, r, c), r <= c; overwritten.
    Returns:  (n, r, c).
    """
    # The map of (X, T) is that of (X / f, T f). With f >= 1 / T neither the products nor 1 / (T f)^2 leave the range.
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp_min(1 / T)
    X.div_(norm)
    A = symmetric_product(X, X.mT)
    A.diagonal(dim1=-2, dim2=-1).add_((T * norm).pow(-2).squeeze(-1))
    size = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    Y, Z = A.div_(size), None
    for k in range(steps):
        W = (Y.clone() if Z is None else symmetric_product(Z, Y)).mul_(-0.5)
        W.diagonal(dim1=-2, dim2=-1).add_(1.5)
        Z = W if Z is None else symmetric_product(W, Z)
        if k + 1 < steps:
            Y = symmetric_product(Y, W)
    assert Z is not None
    return (Z @ X).div_(size.sqrt())


def singular_values(matrices: list[nn.Parameter]) -> Tensor:
    """Singular values of the gradients, (n,), float64: roots of the eigenvalues of the smaller Gram side.

    Below 1e-8 of a matrix's largest they are rounding, as those of a float32 decomposition are below 1e-7.
    """
    found = []
    for stack in stacks(matrices):
        G = torch.stack([p.grad.flatten(1) for p in stack if p.grad is not None]).double()
        gram = G.mT @ G if G.shape[-2] > G.shape[-1] else G @ G.mT
        found.append(torch.linalg.eigvalsh(gram).clamp_min_(0.0).sqrt_().flatten().to(matrices[0].device))
    return torch.cat(found)


@OPTIMIZERS.register("softmuon")
class SoftMuon(Softening, MatrixMethod):
    """SoftMuon for the hidden matrices, AdamW inside for all else (see MatrixMethod), which does not soften.

    lr is in units of spectral norm a step. ns_dtype "bfloat16" means float32 on a CPU without bfloat16 products.
    Raises:
        FrankensteinError: as Softening.
    """

    name = "softmuon"

    def __init__(  # noqa: PLR0913  the method's hyperparameters, keyword only
        self,
        params: ParamsT,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        ns_dtype: str = "bfloat16",
        sign_steps: int | None = None,
        transition_steps: int | None = None,
        sat_eps: float = 1e-4,
        newton_steps: int = 10,
        t_max: float = 1e9,
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
            "sign_steps": sign_steps,
            "transition_steps": transition_steps,
            "sat_eps": sat_eps,
            "newton_steps": newton_steps,
            "t_max": t_max,
            "betas": betas,
            "eps": eps,
            "fallback_lr_ratio": fallback_lr_ratio,
            "matrix": matrix,
        }
        super().__init__(params, arguments)

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        matrices = [p for p in members if self.takes(group, p)]
        if matrices and self.softened(group) and group["schedule"] is None:
            y = 1 - group["sat_eps"]
            self.start(group, singular_values(matrices), y / math.sqrt(1 - y * y))
        super().update(group, members)

    def orthogonalize(self, group: dict[str, Any], X: Tensor) -> Tensor:
        T = self.temperature(group)
        if T is not None:
            return soften(X, T, steps=group["ns_steps"])
        exact = group["ns_dtype"] == "float32"
        return muon.orthogonalize(X, steps=group["ns_steps"], eps=group["ns_eps"], exact=exact)
