"""An embedding table in few bits: one row, one scale.

int8, rounded after training:
    s = bf16(max(max|e|, 1e-5) / 127)     c = clip(round(e / s), -127, 127)     e ~ c s
ternary, trained as such (straight-through), with the arithmetic of `bitlinear`:
    s = max(mean|e|, 1e-5)                c = clip(round(e / s), -1, 1)         e ~ c s

The int8 scale has eight significant bits, so c s is exact in float32 and quantizing the rounded table again changes
nothing.
Source: ternary, seed 002 eq. 17 and 35, https://arxiv.org/abs/2402.17764; a scale a row, Zhang et al. 2020
(TernaryBERT), section 3.1, https://arxiv.org/abs/2009.12812.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.quantization.bitlinear import SCALE_FLOOR, Latent, ternary_codes
from frankenstein.quantization.packing import pack_rows, packed_width, unpack_rows


def quantize_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """(V, D) -> codes (V, D) int8, scale (V, 1) float32 with the values of bfloat16."""
    table = table.detach().float()
    largest = table.abs().amax(1, keepdim=True).clamp_min_(SCALE_FLOOR)
    scale = (largest / 127.0).to(torch.bfloat16).float()
    return (table / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def round_embeddings(embedding: nn.Module) -> None:
    """Put a float table on its int8 grid, in place, so that the packed form is equal bit for bit.

    A ternary table is on its own grid already and stays.
    """
    if isinstance(embedding, nn.Embedding):
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


class _StraightThrough(torch.autograd.Function):
    """Ternary rows in the forward pass, exactly codes times scale; the gradient passes as if nothing was rounded."""

    @staticmethod
    def forward(ctx, rows: Tensor, strength: float) -> Tensor:  # type: ignore[no-untyped-def]
        codes, scale = ternary_codes(rows, per_channel=True)
        quantized = codes.mul_(scale[:, None])
        return quantized if strength == 1.0 else torch.lerp(rows, quantized, strength)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


class TernaryEmbedding(Latent):
    """Embedding table whose latent float rows act as ternary ones, in training: (...) int64 -> (..., D).

    At strength 1 it equals its packed form bit for bit; see `set_strength`.
    """

    def __init__(self, latent: nn.Parameter) -> None:
        super().__init__()
        self.latent = latent

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "TernaryEmbedding":
        """The same parameter (the object, not a copy) under ternary arithmetic."""
        return cls(embedding.weight)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The table (V, D) as it acts: what a tied output projection multiplies with."""
        return self._ternary(self.latent)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.latent)
        return self._ternary(rows.flatten(0, -2)).view_as(rows)

    def _ternary(self, rows: Tensor) -> Tensor:
        if self.lambda_w == 0.0:
            return rows
        quantized: Tensor = _StraightThrough.apply(rows, self.lambda_w)
        return quantized


class PackedTernaryEmbedding(nn.Module):
    """Embedding lookup in a table of two bits a weight, for inference: (...) int64 -> (..., D) float32.

    Saved tensors: qweight (V, ceil(D / 4)) uint8, as `packing` lays it out, and scale (V,).
    """

    qweight: Tensor
    scale: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("qweight", torch.zeros(vocab_size, packed_width(width), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(vocab_size))

    @classmethod
    def from_ternary(cls, embedding: TernaryEmbedding) -> "PackedTernaryEmbedding":
        """The packed form of a trained table."""
        codes, scale = ternary_codes(embedding.latent.detach(), per_channel=True)
        packed = cls(*embedding.latent.shape)
        packed.qweight, packed.scale = pack_rows(codes.to(torch.int8)), scale.float()
        return packed

    @property
    def weight(self) -> Tensor:
        """The table (V, D) in float32, decoded at every use: what a tied output projection multiplies with."""
        return unpack_rows(self.qweight, self.width) * self.scale[:, None]

    def unpack(self) -> None:
        """Check the stored codes; the table itself stays packed. Raises: FrankensteinError: on a code 0b11."""
        unpack_rows(self.qweight, self.width)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        codes = unpack_rows(self.qweight.index_select(0, flat), self.width)
        return (codes * self.scale.index_select(0, flat)[:, None]).view(*ids.shape, self.width)
