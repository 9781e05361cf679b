"""The head that turns hidden vectors back into tokens, by the embedding table where the two are tied."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MlmHead(nn.Module):
    """Token logits: the embedding table (tied) or a matrix of its own, plus a bias per token.

    Source: weight tying, Press and Wolf 2017, https://arxiv.org/abs/1608.05859; output bias, Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805.
    """

    def __init__(self, vocab_size: int, width: int, tied: bool) -> None:
        super().__init__()
        self.output = None if tied else nn.Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, rows: Tensor, table: Tensor | None = None) -> Tensor:
        """Logits (n, V) of rows (n, W); table (V, W) is the embedding where tied, and not needed where not."""
        return F.linear(rows, table if self.output is None else self.output.weight, self.bias)  # type: ignore[arg-type]
