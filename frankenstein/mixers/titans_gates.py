"""How far each write of a block reaches, under forgetting and momentum: the gates of Titans' memory multiplied out.

In a block that starts from the memory M_0 and the momentum S_0, and whose token j writes w_j k_j e_j^T,

    S_i = sum_j s_ij k_j e_j^T + s_i S_0,               s_i. = eta_i s_(i-1). + w_i [at j = i]
    M_i = sum_j m_ij k_j e_j^T + p_i M_0 + r_i S_0,     m_i. = (1 - alpha_i) m_(i-1). + s_i.

so that all coefficients come from these two recurrences over rows, with two more columns for M_0 and S_0; nothing is
ever divided by a product. Source of the rule: Behrouz et al. 2025, eq. 13-14, https://arxiv.org/abs/2501.00663.
Shapes: N blocks of C tokens; gates (C, N, 1). Coefficients (C + 1, N, C + 2): row 0 is before the first token, row i
after token i; in reverse order row C is before the first token to be read, the last one, and row i - 1 after token i.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """Gates of one direction, (C, N, 1) each: w = 2 theta, 1 - alpha and eta."""

    rate: Tensor
    keep: Tensor
    eta: Tensor


class Order(NamedTuple):
    """The order in which tokens and blocks are read; `before` and `after` are the rows before and after each token."""

    reverse: bool

    @property
    def before(self) -> slice:
        return slice(1, None) if self.reverse else slice(None, -1)

    @property
    def after(self) -> slice:
        return slice(None, -1) if self.reverse else slice(1, None)

    def steps(self, count: int) -> range:
        """The places 0 .. count - 1 in the order of reading."""
        return range(count - 1, -1, -1) if self.reverse else range(count)


def coefficients(gates: Gates, order: Order) -> tuple[Tensor, Tensor]:
    """m with p and r, and s with 0 and the s of S_0: (C + 1, N, C + 2) each."""
    size, count, _ = gates.rate.shape
    memory, momentum = gates.rate.new_zeros(2, size + 1, count, size + 2)
    start = size if order.reverse else 0
    memory[start, :, size] = 1
    momentum[start, :, size + 1] = 1
    _of_own_write(momentum, order).copy_(gates.rate[..., 0].mT)
    memories, momenta = memory.unbind(), momentum.unbind()
    keeps, etas = gates.keep.unbind(), gates.eta.unbind()
    for token in order.steps(size):
        old, new = (token + 1, token) if order.reverse else (token, token + 1)
        momenta[new].addcmul_(etas[token], momenta[old])
        torch.addcmul(momenta[new], keeps[token], memories[old], out=memories[new])
    return memory, momentum


def coefficients_backward(gates: Gates, order: Order, values: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Tensor:
    """Gradients (3, C, N) of the gates from the coefficients and their gradients, which are overwritten."""
    (memory, momentum), (d_memory, d_momentum) = values, grads
    d_memories, d_momenta = d_memory.unbind(), d_momentum.unbind()
    keeps, etas = gates.keep.unbind(), gates.eta.unbind()
    for token in reversed(order.steps(len(keeps))):
        old, new = (token + 1, token) if order.reverse else (token, token + 1)
        d_momenta[new].add_(d_memories[new])
        d_momenta[old].addcmul_(etas[token], d_momenta[new])
        d_memories[old].addcmul_(keeps[token], d_memories[new])
    d_rate = _of_own_write(d_momentum, order).mT
    d_keep = (d_memory[order.after] * memory[order.before]).sum(-1)
    d_eta = (d_momentum[order.after] * momentum[order.before]).sum(-1)
    return torch.stack([d_rate, d_keep, d_eta])


def _of_own_write(momentum: Tensor, order: Order) -> Tensor:
    """(N, C): s_ii."""
    return momentum[order.after].diagonal(dim1=0, dim2=2)
