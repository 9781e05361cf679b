"""From the rows of the embedding table to the stream that enters the first layer.

    x = table[ids]  ->  x W^T (factorized)  ->  x + conv(x) (embedding convolution)  ->  s x (dynamic tanh, dynamic erf)

Source: factorized table, Lan et al. 2019 (ALBERT), section 3.1, https://arxiv.org/abs/1909.11942; convolution, seed 001
section 3.3, which leaves its form open: here a filter per channel with a residual around it; the learned scalar s,
sqrt(D) at the start, Zhu et al. 2025, appendix A, "Large Language Models", https://arxiv.org/abs/2503.10622: layers
without statistics do not undo the small scale of a table, and training struggles.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from frankenstein.mixers.short_conv import ShortConv
from frankenstein.model.norms import NORMS, Elementwise
from frankenstein.model.options import ModelOptions


class EmbeddingStream(nn.Module):
    """What follows the table: a projection from E to D channels, a convolution over time, a scalar; any or none.

    The table itself stands outside, in whatever form it is stored.
    """

    parameter_group: ClassVar[str] = "embeddings"

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        width, inner = options.hidden_size, options.factorized_embedding_dim
        self.width = width
        self.projection = nn.Linear(inner, width, bias=False) if options.use_factorized_embedding else None
        kernel, causal = options.embedding_conv_kernel, options.causal
        size = kernel if causal else (kernel + 1) // 2
        self.conv = ShortConv(width, size, causal=causal) if options.use_embedding_conv else None
        bare = issubclass(NORMS[options.norm_type], Elementwise)
        self.scale = nn.Parameter(torch.full((1,), math.sqrt(width))) if bare else None
        self.initialize()

    @property
    def table_width(self) -> int | None:
        """E, channels of the table; None where it is as wide as the encoder."""
        return None if self.projection is None else self.projection.in_features

    @property
    def table_std(self) -> float | None:
        """Deviation of the table's entries at the start, so that they enter the first layer with 1; None: free."""
        return None if self.scale is None else 1.0 / math.sqrt(self.width)

    def initialize(self) -> None:
        """The projection keeps the variance of the table's rows, the convolution starts as the identity."""
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        if self.conv is not None:
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows of the table (B, T, E) to (B, T, D); mask (B, T), True for real tokens, which come first."""
        if self.projection is not None:
            x = self.projection(x)
        if self.conv is not None:
            x = x + self.conv(x, mask)
        return x if self.scale is None else x * self.scale

    def to_table(self, rows: Tensor) -> Tensor:
        """Hidden rows (n, D) to (n, E), by the same projection: what a tied head multiplies with the table."""
        return rows if self.projection is None else rows @ self.projection.weight
