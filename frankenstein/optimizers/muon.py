"""Muon: momentum whose singular values are pushed to about 1 by a Newton-Schulz iteration.

    X = U / max(||U||_F, ns_eps);  ns_steps times  X <- a X + (b A + c A A) X,  A = X X^T
    (a, b, c) = (3.4445, -4.7750, 2.0315);  theta <- (1 - lr wd) theta - lr adjust X        (U: see matrix_method.py)
    adjust: "original" sqrt(max(1, rows / columns)), "match_rms_adamw" 0.2 sqrt(max(rows, columns))
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, section 2.2 (match_rms_adamw),
https://arxiv.org/abs/2502.16982; torch.optim.Muon.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from frankenstein.optimizers.base import OPTIMIZERS
from frankenstein.optimizers.matrix_method import MatrixMethod, symmetric_product

Triples = Sequence[tuple[float, float, float]]
_TRIPLE = (3.4445, -4.7750, 2.0315)
_WIDE = 1.5  # columns per row from which the iteration on the Gram matrix is cheaper
_GRAM_STEPS = 5  # rounding makes eigenvalues of A of -1e-7, which grow by a^2 a step: 1e-3 after 5, no bound after 8


def orthogonalize(X: Tensor, *, steps: int, eps: float, exact: bool) -> Tensor:
    """Muon's map of a stack of matrices.

    Args:
        X: (n, r, c), r <= c; overwritten.
        exact: see newton_schulz.
    Returns:  (n, r, c).
    """
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    X.div_(norm.clamp_min(eps))
    return newton_schulz(X, symmetric_product(X, X.mT), [_TRIPLE] * steps, exact=exact)


def newton_schulz(X: Tensor, A: Tensor, triples: Triples, *, exact: bool) -> Tensor:
    """For every triple (a, b, c): X <- a X + (b A + c A A) X, A = X X^T.

    Args:
        X: (n, r, c), no singular value above about 1.
        A: (n, r, r), X X^T.
        exact: False allows, for wide float32 matrices, to iterate on the Gram matrix only: half the arithmetic at
            c = 4 r, more rounding, but below a twentieth of bfloat16's.
    Returns:  (n, r, c).
    """
    if not exact and X.dtype == torch.float32 and X.shape[-1] > _WIDE * X.shape[-2]:
        for start in range(0, len(triples), _GRAM_STEPS):
            gram = A if start == 0 else symmetric_product(X, X.mT)
            X = _gram_polynomial(gram, triples[start : start + _GRAM_STEPS]) @ X
        return X
    for k, (a, b, c) in enumerate(triples):
        gram = A if k == 0 else symmetric_product(X, X.mT)
        X = torch.baddbmm(X, _quadratic(gram, b, c), X, beta=a)
    return X


def _gram_polynomial(A: Tensor, triples: Triples) -> Tensor:
    """Q with newton_schulz(X) = Q X: Q <- P Q, A <- P A P, P = a I + b A + c A A. All of them commute."""
    Q = None
    for k, (a, b, c) in enumerate(triples):
        P = _quadratic(A, b, c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else symmetric_product(P, Q)
        if k + 1 < len(triples):
            A = symmetric_product(symmetric_product(P, A), P)
    assert Q is not None
    return Q


def _quadratic(A: Tensor, b: float, c: float) -> Tensor:
    """b A + c A A."""
    if A.device.type == "cpu" and A.dtype == torch.float32:
        return symmetric_product(A, A).mul_(c).add_(A, alpha=b)
    return torch.baddbmm(A, A, A, beta=b, alpha=c)


@OPTIMIZERS.register("muon")
class Muon(MatrixMethod):
    """Muon for the hidden matrices, AdamW inside for all else (see MatrixMethod).

    lr is in units of spectral norm a step. ns_dtype "bfloat16" means float32 on a CPU without bfloat16 products.
    """

    name = "muon"

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
        adjust_lr_fn: str = "original",
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
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "betas": betas,
            "eps": eps,
            "fallback_lr_ratio": fallback_lr_ratio,
            "matrix": matrix,
        }
        super().__init__(params, arguments)

    def orthogonalize(self, group: dict[str, Any], X: Tensor) -> Tensor:
        exact = group["ns_dtype"] == "float32"
        return orthogonalize(X, steps=group["ns_steps"], eps=group["ns_eps"], exact=exact)

    def adjustment(self, group: dict[str, Any], rows: int, columns: int) -> float:
        if group["adjust_lr_fn"] == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return super().adjustment(group, rows, columns)
