"""Short convolution over time, a filter per channel, in front of recurrent mixers.

    y_t = sum_j w_j x_(t-j)        j = 0 .. C-1 one way; j = -(C-1) .. C-1 both ways, centred on t

Source: Gu and Dao 2023 (Mamba), section 3.4, https://arxiv.org/abs/2312.00752 (one way); Hwang et al. 2024 (Hydra),
https://arxiv.org/abs/2407.09941, whose filter of 7 is the centred twin of Mamba's 4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.kernels import short_conv


class ShortConv(nn.Module):
    """Depthwise convolution over time: (B, T, D) to (B, T, D). Padded tokens give nothing and come out as 0.

    Args:
        width: D.
        size: C, tokens that a causal filter covers; the filter of both directions covers 2 C - 1.
        causal: see only the past.
        bias: add a bias per channel.
    """

    def __init__(self, width: int, size: int, *, causal: bool, bias: bool = False) -> None:
        super().__init__()
        taps = size if causal else 2 * size - 1
        self.size, self.causal = size, causal
        bound = 1 / math.sqrt(taps)  # torch's own default for a depthwise filter
        self.weight = nn.Parameter(torch.empty(width, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (B, T) bool, True for real tokens."""
        padded = None if mask is None else ~mask[..., None]
        if padded is not None:
            x = x.masked_fill(padded, 0.0)
        before, after = self.size - 1, 0 if self.causal else self.size - 1
        if short_conv.usable(x, self.weight):
            y = short_conv.convolve(x, self.weight, self.bias, -before)
        else:
            x = F.pad(x, (0, 0, before, after))
            # An image of height 1 with channels last is how (B, T, D) lies in memory: no copy.
            y = F.conv2d(x.mT.unsqueeze(2), self.weight[:, None, None, :], self.bias, groups=x.shape[-1])
            y = y.squeeze(2).mT
        return y if padded is None else y.masked_fill(padded, 0.0)
