"""The dense feed-forward sublayer."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class FeedForward(nn.Module):
    """Two linear layers with an activation between: W_out act(W_up x).

    Source: Vaswani et al. 2017, section 3.3, https://arxiv.org/abs/1706.03762; no biases, as seed 002 eq. 41.
    Args:
        width: D.
        inner: F.
        activation: "gelu" (exact, with erf) or "silu".
    """

    def __init__(self, width: int, inner: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.up = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., D) to (..., D), every token by itself, so that the mask changes nothing."""
        return self.out(self.activation(self.up(x)))
