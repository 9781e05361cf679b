"""Two bits a weight: layout by hand, round trips with tails, damage, sizes."""

import math

import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.packing import pack_rows, packed_width, size_table, unpack_rows


def ternary(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)


def test_the_layout_is_planar_within_a_row():
    row = torch.tensor([[-1, 0, 1, 1, 0, -1, 0, 1]], dtype=torch.int8)
    # byte 0 holds weights 0, 2, 4, 6; byte 1 holds weights 1, 3, 5, 7
    assert pack_rows(row).tolist() == [[0 | 2 << 2 | 1 << 4 | 1 << 6, 1 | 2 << 2 | 0 << 4 | 2 << 6]]


def test_positions_beyond_the_row_hold_the_code_of_zero():
    assert pack_rows(torch.tensor([[1, -1, 1, -1, 1]], dtype=torch.int8)).tolist() == [
        [2 | 2 << 2 | 2 << 4 | 1 << 6, 0 | 0 << 2 | 1 << 4 | 1 << 6]
    ]


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 63, 64, 130])
@pytest.mark.parametrize("rows", [1, 7])
def test_unpacking_gives_back_what_was_packed(rows, columns):
    codes = ternary(rows, columns)
    packed = pack_rows(codes)
    assert packed.shape == (rows, math.ceil(columns / 4)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_rows(packed, columns), codes)


def test_the_code_0b11_is_refused_with_its_row():
    packed = pack_rows(ternary(5, 12))
    packed[3, 1] |= 0b00110000
    with pytest.raises(FrankensteinError, match="row 3 holds the code 0b11"):
        unpack_rows(packed, 12)


def test_a_wrong_width_is_refused():
    with pytest.raises(FrankensteinError, match="packed rows of 3 bytes; 13 weights take 4"):
        unpack_rows(pack_rows(ternary(2, 12)), 13)


def test_sizes_follow_the_formulas():
    sizes = size_table([(128, 384), (7, 13)])
    weights = 128 * 384 + 7 * 13
    assert sizes == {
        "weights": weights,
        "float32": 4 * weights,
        "float16": 2 * weights,
        "two_bit": 128 * 96 + 7 * 4,
        "base3": math.ceil(128 * 384 / 5) + math.ceil(7 * 13 / 5),
        "theory": math.ceil(weights * math.log2(3) / 8),
    }
    assert sizes["two_bit"] == pack_rows(ternary(128, 384)).numel() + pack_rows(ternary(7, 13)).numel()
    assert packed_width(13) == 4
