"""Rotary positions: Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864.

    (x_a, x_b) -> (x_a cos mt - x_b sin mt, x_a sin mt + x_b cos mt),   t_i = base^(-2i/K),   m = 0 .. T-1

The pair (a, b) of angle i is (2i, 2i+1) in the paper and in seed 002 eq. 18 ("interleaved"), (i, i + K/2) in many later
models ("half").
"""

import torch
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.kernels import rotary

PAIRINGS = ("interleaved", "half")


class Rotary:
    """Turns queries or keys by their position. Holds no parameters; tables are cached by width, device and precision.

    Args:
        base: of the angles.
        pairing: "interleaved" or "half".
    """

    def __init__(self, base: float = 10000.0, pairing: str = "interleaved") -> None:
        if pairing not in PAIRINGS:
            raise FrankensteinError(f"unknown rotary pairing {pairing!r}; known: {', '.join(PAIRINGS)}")
        self.base, self.pairing = base, pairing
        self._tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, H, K) to the same shape and dtype; angles and products are float32 (float64 for float64 input).

        Raises:
            FrankensteinError: if K is odd.
        """
        length, width = x.shape[1], x.shape[-1]
        if width % 2:
            raise FrankensteinError(
                f"rotary positions turn pairs of channels; found {width} channels a head, expected an even number"
            )
        half = self.pairing == "half"
        if rotary.usable(x):
            return rotary.rotate(x, self._table(length, width, x.new_empty(0, dtype=torch.float32)), split=half)
        real = x if x.dtype == torch.float64 else x.float()
        turn = self._table(length, width, real)[:, None]
        pairs = real.unflatten(-1, (2, -1)).mT if half else real.unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # which generates no code for complex numbers
            (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
        else:  # one complex product is five times as fast on CPU as the four real ones
            product = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(turn)
            turned = torch.view_as_real(product)
        return (turned.mT if half else turned).flatten(-2).to(x.dtype)

    def _table(self, length: int, width: int, like: Tensor) -> Tensor:
        """(T, K/2, 2): cosines and sines of m t."""
        key = (width, like.device, like.dtype)
        table = self._tables.get(key)
        if table is None or table.shape[0] < length:
            # Outside of inference mode: a later training step uses the same table.
            with torch.inference_mode(False):
                table = rotary_table(length, width, self.base, like.dtype).to(like.device)
            self._tables[key] = table
        return table[:length]


def rotary_table(length: int, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """(T, K/2, 2): cosines and sines of m t, computed in float64 and rounded once to the precision of `dtype`."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    turn = torch.view_as_real(torch.polar(torch.ones_like(angles), angles))
    return turn if dtype == torch.float64 else turn.float()
