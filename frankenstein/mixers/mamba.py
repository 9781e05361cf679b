"""Mamba: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.4 and figure 3,
https://arxiv.org/abs/2312.00752.

    x, z = split(W_in X),   u = SiLU(conv(x)),   y = scan(u; dt, A, B, C) + D u,   out = W_out (y SiLU(z))
    dt = softplus(W_up W_down u + b),   B = W_B u,   C = W_C u,   A = -exp(A_log)

An encoder scans both ways (`selective_scan.py`): one u, one D and one gate z, applied to the sum, as in Hydra, Hwang et
al. 2024, https://arxiv.org/abs/2407.09941; each direction has dt, A, B, C of its own.
Shapes: X (B, T, D); x, z, u, y, dt (B, T, F), F = expand D; B, C (B, T, N); A_log (F, N).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.selective_scan import bidirectional_selective_scan, selective_scan
from frankenstein.mixers.short_conv import ShortConv
from frankenstein.options import option

DT_FLOOR = 1e-4


@MIXERS.register("mamba")
class Mamba(Mixer):
    """Selective state space layer with short convolution and SiLU gate.

    Source: Gu and Dao 2023, https://arxiv.org/abs/2312.00752; code https://github.com/state-spaces/mamba.
    Seed 002 section 4.4 simplifies the block; this is the authors'. Their x_proj is two matrices here: B and C are an
    ordinary linear layer; dt, A_log and D are sensitive to rounding and stay in full precision.
    """

    parameter_group: ClassVar[str] = "mamba"
    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the recurrence tells them; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `mamba`."""

        state_size: int = option(16, "States per channel, N.", minimum=1)
        expand: int = option(2, "Channels of the scan, in multiples of hidden_size.", minimum=1)
        conv_size: int = option(
            4, "Tokens that the short convolution covers; both ways it covers 2 conv_size - 1.", minimum=1
        )
        dt_rank: int | None = option(
            None, "Rank of the step size's projection; null means hidden_size / 16.", minimum=1
        )
        dt_min: float = option(1e-3, "Smallest step size at the start of training.", exclusiveMinimum=0.0)
        dt_max: float = option(0.1, "Largest step size at the start of training.", exclusiveMinimum=0.0)
        separate_directions: bool = option(
            True, "The reverse direction has its own dt, A, B and C; false shares them. Without effect when causal."
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        if options.dt_min > options.dt_max:
            raise FrankensteinError(
                f"model.mixers.mamba.dt_min={options.dt_min} is larger than dt_max={options.dt_max}"
            )
        inner, self.causal = options.expand * context.hidden_size, context.causal
        directions = 2 if options.separate_directions and not context.causal else 1
        rank = math.ceil(context.hidden_size / 16) if options.dt_rank is None else options.dt_rank
        self.in_proj = nn.Linear(context.hidden_size, 2 * inner, bias=False)
        self.conv = ShortConv(inner, options.conv_size, causal=context.causal, bias=True)
        self.bc_proj = nn.Linear(inner, 2 * directions * options.state_size, bias=False)
        self.dt_down = nn.Parameter(torch.empty(directions * rank, inner).uniform_(-(inner**-0.5), inner**-0.5))
        self.dt_up = nn.Parameter(torch.empty(directions, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_bias = nn.Parameter(_step_bias((directions, inner), options.dt_min, options.dt_max))
        rates = torch.arange(1, options.state_size + 1, dtype=self.dt_bias.dtype)
        self.A_log = nn.Parameter(rates.log().repeat(directions, inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, context.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        x, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv(x, mask))
        B, C, *rev = self.bc_proj(u).chunk(2 * len(self.A_log), -1)
        u, delta = self._step_sizes(u)
        A = -self.A_log.exp()
        if self.causal:  # padding comes last, so that no real token sees it
            y, _ = selective_scan(u, delta[0], A[0], B, C, D=self.D, delta_softplus=True)
        else:
            own = {"delta_rev": delta[1], "A_rev": A[1], "B_rev": rev[0], "C_rev": rev[1]} if rev else {}
            y = bidirectional_selective_scan(u, delta[0], A[0], B, C, D=self.D, delta_softplus=True, mask=mask, **own)
        return self.out(y * F.silu(z))

    def _step_sizes(self, u: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The scan's input and the step sizes (B, T, F) before softplus, in the parameters' precision."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.dt_bias.dtype)
            low = F.linear(u, self.dt_down).chunk(len(self.dt_up), -1)
            return u, [F.linear(*parts) for parts in zip(low, self.dt_up, self.dt_bias, strict=True)]


def _step_bias(shape: tuple[int, int], smallest: float, largest: float) -> Tensor:
    """Biases whose softplus is log-uniform between two step sizes, at least DT_FLOOR: the authors' initialization."""
    low, high = math.log(smallest), math.log(largest)
    dt = torch.empty(shape).uniform_(low, high).exp().clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
