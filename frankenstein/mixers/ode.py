"""Attention in continuous depth: Chen et al. 2018, "Neural Ordinary Differential Equations", section 2,
https://arxiv.org/abs/1806.07366, with the dynamics of Zhang et al. 2021,
https://doi.org/10.1609/aaai.v35i16.17692, as seed 002 eq. 26-28 has them.

    dz/dt = f(z, t) = W_O softmax(Q K^T / sqrt(K)) V,   z(0) = x,   t from 0 to 1
    Q, K, V = (W * (1 + a sin(omega t))) z             a and omega for every row of W_Q, W_K, W_V

The block around the layer adds x, so that the layer gives z(1) - z(0): one Euler step is a residual attention block.
Shapes: z (B, T, D).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.options import option

Dynamics = Callable[[float, Tensor], Tensor]


def euler_step(f: Dynamics, t: float, z: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The change of z over one step, and f(t, z)."""
    slope = f(t, z)
    return step * slope, slope


def rk4_step(f: Dynamics, t: float, z: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The same by the classical Runge-Kutta rule of order 4 (seed 002 algorithm 2)."""
    k1 = f(t, z)
    k2 = f(t + step / 2, torch.add(z, k1, alpha=step / 2))
    k3 = f(t + step / 2, torch.add(z, k2, alpha=step / 2))
    k4 = f(t + step, torch.add(z, k3, alpha=step))
    return (step / 6) * torch.add(k1 + k4, k2 + k3, alpha=2), k1


SOLVERS = {"rk4": rk4_step, "euler": euler_step}


def ode_solve(f: Dynamics, z0: Tensor, *, steps: int, solver: str = "rk4", t0: float = 0.0, t1: float = 1.0) -> Tensor:
    """z(t1) of dz/dt = f(t, z), z(t0) = z0, by `steps` equal steps; the gradient is that of the steps themselves.

    Source: Chen et al. 2018, eq. 2, https://arxiv.org/abs/1806.07366; they get the gradient from a second equation,
    solved backwards, whose error of discretization this one does not have.
    Args:
        f: of the time and z, gives dz/dt in the shape of z.
        z0: of any shape.
        solver: rk4 (four evaluations of f a step) or euler (one).
    Raises:
        FrankensteinError: if the solver is unknown or steps is below 1.
    """
    return z0 + _change(f, z0, steps=steps, solver=solver, t0=t0, t1=t1)[0]


def _change(
    f: Dynamics, z0: Tensor, *, steps: int, solver: str, t0: float = 0.0, t1: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """z(t1) - z(t0), and f at the start of every step."""
    _check(solver, steps)
    step, z, change, slopes = (t1 - t0) / steps, z0, torch.zeros_like(z0), []
    for i in range(steps):
        moved, slope = SOLVERS[solver](f, t0 + i * step, z, step)
        change = change + moved  # of the precision of z0; f may have less
        z = z0 + change
        slopes.append(slope)
    return change, slopes


def _check(solver: str, steps: int) -> None:
    if solver not in SOLVERS:
        raise FrankensteinError(f"model.ode_solver: unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    if steps < 1:
        raise FrankensteinError(f"model.ode_steps: found {steps}; expected at least 1")


@MIXERS.register("ode")
class NeuralODEAttention(Mixer):
    """Softmax attention, integrated over a depth of its own by `model.ode_solver` in `model.ode_steps` steps.

    Source: Chen et al. 2018, https://arxiv.org/abs/1806.07366; seed 002 eq. 26-28 and 52. Where the seed leaves it
    open: a and omega have a value per channel, the heads are joined by W_O inside of f, and the penalty is the mean
    over real tokens.
    """

    parameter_group: ClassVar[str] = "ode"
    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")

    @dataclass(frozen=True)
    class Options:
        """Options of `ode`; the solver and its steps are model.ode_solver and model.ode_steps."""

        amplitude: float = option(
            0.1, "First value of a: how much the weights swing with the time of integration, relative to themselves."
        )
        frequency: float = option(math.pi, "First value of omega, in radians per unit of time.", exclusiveMinimum=0.0)
        penalty: float = option(
            0.001,
            "Weight of the mean squared length of f in the training loss (seed 002 eq. 52); 0: none.",
            minimum=0.0,
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        _check(context.ode_solver, context.ode_steps)
        width, heads = context.hidden_size, context.num_heads
        groups = heads if context.num_kv_heads is None else context.num_kv_heads
        self.heads, self.head_width = (heads, groups, groups), width // heads
        self.causal, self.rotary, self.scores = context.causal, context.rotary, context.scores
        self.solver, self.steps, self.penalty = context.ode_solver, context.ode_steps, options.penalty
        self.project = nn.Linear(width, sum(self.heads) * self.head_width, bias=False)
        self.amplitude = nn.Parameter(torch.full((self.project.out_features,), options.amplitude))
        self.frequency = nn.Parameter(torch.full((self.project.out_features,), options.frequency))
        self.out = nn.Linear(width, width, bias=False)
        self._losses: dict[str, Tensor] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        change, slopes = _change(lambda t, z: self.dynamics(t, z, mask), x, steps=self.steps, solver=self.solver)
        self._losses = {}
        if self.training and self.penalty > 0:
            lengths = torch.stack([_mean_square_length(slope, mask) for slope in slopes])
            self._losses["ode"] = self.penalty * lengths.mean()
        return change

    def dynamics(self, t: float, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """f(z, t), (B, T, D): attention whose projections depend on t; padded tokens are no keys."""
        # Rows of W times a number each are outputs times these numbers: the weights stay as they are, ternary or not.
        swing = (1 + self.amplitude * (self.frequency * t).sin()).unflatten(0, (-1, self.head_width))
        projected = self.project(z).unflatten(-1, (-1, self.head_width))
        q_k, v = (projected * swing.to(projected.dtype)).split((self.heads[0] + self.heads[1], self.heads[2]), 2)
        if self.rotary is not None:
            q_k = self.rotary(q_k)
        q, k = q_k.split(self.heads[:2], 2)
        k, v = repeat_heads(k, self.heads[0]), repeat_heads(v, self.heads[0])
        o = softmax_attention(q, k, v, key_padding_mask=mask, causal=self.causal, scores=self.scores)
        return self.out(o.flatten(2))

    def losses(self) -> dict[str, Tensor]:
        """{"ode": penalty x mean over steps and real tokens of |f|^2} of the last call in training."""
        return self._losses

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without losses, whose graph cannot be copied."""
        return {**self.__dict__, "_losses": {}}


def _mean_square_length(slope: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of |slope|^2, in float32 or wider."""
    squares = slope.to(torch.promote_types(slope.dtype, torch.float32)).square().sum(-1)
    return squares.mean() if mask is None else (squares * mask).sum() / mask.sum()
