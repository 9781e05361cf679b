"""An embedding table in int8: one row, one scale.

    s = bf16(max(max|e|, 1e-5) / 127)     c = clip(round(e / s), -127, 127)     e ~ c s

The scale has eight significant bits, so c s is exact in float32 and quantizing the rounded table again changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.quantization.bitlinear import SCALE_FLOOR


def quantize_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """(V, D) -> codes (V, D) int8, scale (V, 1) float32 with the values of bfloat16."""
    table = table.detach().float()
    largest = table.abs().amax(1, keepdim=True).clamp_min_(SCALE_FLOOR)
    scale = (largest / 127.0).to(torch.bfloat16).float()
    return (table / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def round_embeddings(embedding: nn.Embedding) -> None:
    """Put a float table on its int8 grid, in place, so that the packed form is equal bit for bit."""
    codes, scale = quantize_rows(embedding.weight)
    with torch.no_grad():
        embedding.weight.copy_(codes * scale)


class Int8Embedding(nn.Module):
    """Embedding lookup in an int8 table, for inference: (...) int64 -> (..., D) float32."""

    codes: Tensor
    scale: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(vocab_size, width, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(vocab_size, 1))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "Int8Embedding":
        """The int8 form of a float table."""
        packed = cls(*embedding.weight.shape)
        packed.codes, packed.scale = quantize_rows(embedding.weight)
        return packed

    @property
    def weight(self) -> Tensor:
        """The table in float32, decoded at every use: what a tied output projection multiplies with."""
        return self.codes * self.scale

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codes) * F.embedding(ids, self.scale)
