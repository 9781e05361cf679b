"""Two bits a weight, planar within a row; and what every other way of storing ternary weights would take.

Byte j of a row holds the weights j, j + S, j + 2S, j + 3S in bits 0-1, 2-3, 4-5, 6-7 as value + 1; S = ceil(in / 4).
Positions beyond the row's end hold the code of 0. 0b11 is never written and is refused when read.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from frankenstein.errors import FrankensteinError

_ZERO = 1  # the code of weight 0
_INVALID = 3


def packed_width(in_features: int) -> int:
    """Bytes of one packed row."""
    return -(-in_features // 4)


def pack_rows(codes: Tensor) -> Tensor:
    """Ternary codes (out, in) int8 -> (out, ceil(in / 4)) uint8."""
    out_features, in_features = codes.shape
    width = packed_width(in_features)
    values = torch.full((out_features, 4 * width), _ZERO, dtype=torch.uint8, device=codes.device)
    values[:, :in_features] = (codes + 1).to(torch.uint8)
    planes = values.view(out_features, 4, width)
    return planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6


def unpack_rows(packed: Tensor, in_features: int) -> Tensor:
    """(out, ceil(in / 4)) uint8 -> ternary codes (out, in) int8.

    Raises: FrankensteinError: on a wrong width, or on the code 0b11, which no writer produces.
    """
    out_features, width = packed.shape
    if width != packed_width(in_features):
        raise FrankensteinError(f"packed rows of {width} bytes; {in_features} weights take {packed_width(in_features)}")
    table = _decode_table().to(packed.device)
    planes = table[packed.long()].permute(0, 2, 1).reshape(out_features, 4 * width)
    codes = planes[:, :in_features].contiguous()
    if bool((planes == _INVALID - 1).any()):
        row = int((planes == _INVALID - 1).any(1).nonzero()[0])
        raise FrankensteinError(f"row {row} holds the code 0b11, which no ternary weight has; the data is damaged")
    return codes


def _decode_table() -> Tensor:
    """(256, 4) int8: the four values of every byte; 2 stands for the invalid code."""
    bytes_ = torch.arange(256)
    return torch.stack([(bytes_ >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1).sub_(1).to(torch.int8)


def size_table(shapes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Bytes that weight matrices of these (out, in) shapes take, without scales, in each form.

    Returns: float32, float16, two_bit (as packed here), base3 (five weights a byte, 1.6 bits), theory (log2 3 bits).
    """
    sizes = list(shapes)
    weights = sum(rows * columns for rows, columns in sizes)
    return {
        "weights": weights,
        "float32": 4 * weights,
        "float16": 2 * weights,
        "two_bit": sum(rows * packed_width(columns) for rows, columns in sizes),
        "base3": sum(-(-rows * columns // 5) for rows, columns in sizes),
        "theory": math.ceil(weights * math.log2(3) / 8),
    }
