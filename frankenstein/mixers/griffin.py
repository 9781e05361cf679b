"""The recurrent block of Griffin and its real-gated linear recurrent unit (RG-LRU): De et al. 2024,
https://arxiv.org/abs/2402.19427.

    r_t = sigmoid(a_gate_t),   i_t = sigmoid(input_gate_t),   log a_t = -8 softplus(a_param) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t                                (their eq. 1-4)

`a_param` is minus the paper's Lambda, as in the authors' code, https://github.com/google-deepmind/recurrentgemma; that
code gives the first token of a document weight 1 instead of the square root, the paper and we do not.
An encoder reads both ways: y = f(x) + flip(f(flip x)) - f1(x), with f the recurrence above, flip the reversal of time
and f1 the recurrence on every token alone, which both directions count: f1 = sqrt(1 - a_t^2) i_t x_t.
Shapes: x, a_gate, input_gate (B, T, D); a_param (D,); state h (B, D).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.short_conv import ShortConv
from frankenstein.options import option

SHARPNESS = 8.0  # the paper's c
RADIX = 8  # tokens that one level of the scan combines


def rg_lru_recurrent(
    x: Tensor,
    a_gate: Tensor,
    input_gate: Tensor,
    a_param: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time. Arguments as `rg_lru`."""
    state = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        a = (-SHARPNESS * F.softplus(a_param) * a_gate[:, t].sigmoid()).exp()
        state = a * state + (1 - a * a).sqrt() * input_gate[:, t].sigmoid() * x[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1), state if output_final_state else None


def rg_lru(
    x: Tensor,
    a_gate: Tensor,
    input_gate: Tensor,
    a_param: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal RG-LRU by a parallel scan: linear in T.

    Source: De et al. 2024, section 2.4, https://arxiv.org/abs/2402.19427. Decays are only ever multiplied, so that
    strong ones underflow to 0 and nothing overflows. Computed in float32 at least.
    Args:
        x: (B, T, D).
        a_gate, input_gate: (B, T, D), logits of the recurrence gate and of the input gate.
        a_param: (D,), logit of how fast a channel forgets at most.
        initial_state: (B, D); None means zeros.
        output_final_state: return the last state, else None in its place.
    Returns:  (B, T, D), final state (B, D) or None.
    """
    decay, written = _decay_and_input(x, a_gate, input_gate, a_param)
    if initial_state is not None:
        first = decay[:, :1] * initial_state.to(decay.dtype).unsqueeze(1) + written[:, :1]
        written = torch.cat((first, written[:, 1:]), 1)
    h = linear_scan(decay, written)
    return h.to(x.dtype), h[:, -1] if output_final_state else None


def bidirectional_rg_lru_recurrent(
    x: Tensor,
    a_gate: Tensor,
    input_gate: Tensor,
    a_param: Tensor,
    *,
    a_gate_rev: Tensor | None = None,
    input_gate_rev: Tensor | None = None,
    a_param_rev: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The rule of the module docstring, from the recurrence. Arguments as `bidirectional_rg_lru`."""
    real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
    a_back = a_gate if a_gate_rev is None else a_gate_rev
    input_back = input_gate if input_gate_rev is None else input_gate_rev
    param_back = a_param if a_param_rev is None else a_param_rev
    x = x * real
    forward, _ = rg_lru_recurrent(x, a_gate, input_gate, a_param)
    backward, _ = rg_lru_recurrent(x.flip(1), a_back.flip(1), input_back.flip(1), param_back)
    x_one, a_one, input_one = (part.flatten(0, 1).unsqueeze(1) for part in (x, a_gate, input_gate))
    alone, _ = rg_lru_recurrent(x_one, a_one, input_one, a_param)
    return (forward + backward.flip(1) - alone.view_as(x)) * real


def bidirectional_rg_lru(
    x: Tensor,
    a_gate: Tensor,
    input_gate: Tensor,
    a_param: Tensor,
    *,
    a_gate_rev: Tensor | None = None,
    input_gate_rev: Tensor | None = None,
    a_param_rev: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """RG-LRU in both directions by parallel scans: linear in T.

    Args:
        a_gate_rev, input_gate_rev, a_param_rev: those of the direction from right to left, in the order of the tokens;
            None means those of the other direction.
        mask: (B, T) bool, True for real tokens, which come first; padded rows give and get nothing, their output is 0.
        The others as `rg_lru`.
    Returns:  (B, T, D).
    """
    padded = None if mask is None else ~mask[..., None]
    if padded is not None:  # x = 0 writes nothing
        x = x.masked_fill(padded, 0.0)
    decay, written = decay_back, written_back = _decay_and_input(x, a_gate, input_gate, a_param)
    if not (a_gate_rev is None and input_gate_rev is None and a_param_rev is None):
        gates = (a_gate if a_gate_rev is None else a_gate_rev, input_gate if input_gate_rev is None else input_gate_rev)
        decay_back, written_back = _decay_and_input(x, *gates, a_param if a_param_rev is None else a_param_rev)
    y = linear_scan(decay, written) + linear_scan(decay_back, written_back, reverse=True) - written
    y = y.to(x.dtype)
    return y if padded is None else y.masked_fill(padded, 0.0)


def linear_scan(decay: Tensor, written: Tensor, *, reverse: bool = False) -> Tensor:
    """h_t = decay_t h_{t-1} + written_t over dimension 1 of (B, T, D), from right to left with `reverse`; h_0 = 0."""
    h: Tensor = _LinearScan.apply(decay, written, reverse)
    return h


class _LinearScan(torch.autograd.Function):
    """Its gradient is a scan back: e_t = dL/dh_t + decay_{t+1} e_{t+1}; e_t for written_t, e_t h_{t-1} for decay_t."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, written: Tensor, reverse: bool) -> Tensor:
        h = _scan(decay, written, reverse)
        ctx.save_for_backward(decay, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, h = ctx.saved_tensors
        step = -1 if ctx.reverse else 1
        d_written = _scan(_shifted(decay, -step), d_h, not ctx.reverse)
        return d_written * _shifted(h, step), d_written, None


def _shifted(x: Tensor, steps: int) -> Tensor:
    """(B, T, D) moved by one token to the right (1) or to the left (-1), with 0 where nothing comes in."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) if steps > 0 else F.pad(x[:, 1:], (0, 0, 0, 1))


def _scan(decay: Tensor, written: Tensor, reverse: bool) -> Tensor:
    """Blocks of RADIX tokens are scanned all at once, token by token; their ends are scanned in turn, one level up."""
    batch, length, width = written.shape
    padding = (0, 0, 0, -length % RADIX)
    shape = (batch, -1, RADIX, width)
    # Fresh copies, which the scan overwrites: h of the block alone, and the decay since the block's beginning.
    h = F.pad(written, padding).view(shape) if padding[-1] else written.reshape(shape).clone()
    since = F.pad(decay, padding).view(shape) if padding[-1] else decay.reshape(shape).clone()
    order = range(RADIX - 1, -1, -1) if reverse else range(RADIX)
    for before, here in pairwise(order):
        h[:, :, here].addcmul_(since[:, :, here], h[:, :, before])
        since[:, :, here].mul_(since[:, :, before])
    if h.shape[1] > 1:
        end = order[-1]
        ends = _scan(since[:, :, end], h[:, :, end], reverse)
        h.addcmul_(since, _shifted(ends, -1 if reverse else 1).unsqueeze(2))
    return h.flatten(1, 2)[:, :length]


def _decay_and_input(x: Tensor, a_gate: Tensor, input_gate: Tensor, a_param: Tensor) -> tuple[Tensor, Tensor]:
    """a_t and sqrt(1 - a_t^2) i_t x_t, in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, a_param.dtype), torch.float32)
    x, a_gate, input_gate = x.to(dtype), a_gate.to(dtype), input_gate.to(dtype)
    log_decay = a_gate.sigmoid() * (-SHARPNESS * F.softplus(a_param))
    # 1 - a^2 without cancellation; the floor keeps the gradient finite where a gate that underflowed leaves a = 1
    kept = torch.expm1(2 * log_decay).neg().clamp_min(torch.finfo(dtype).tiny)
    return log_decay.exp(), kept.sqrt() * input_gate.sigmoid() * x


@MIXERS.register("griffin")
class GriffinRecurrentBlock(Mixer):
    """The recurrent block of Griffin and Hawk: a short convolution and the RG-LRU, times a GELU branch.

    Source: De et al. 2024, sections 2.3 and 2.4, https://arxiv.org/abs/2402.19427. Width, biases and block-diagonal
    gates, one block a head, follow https://github.com/google-deepmind/recurrentgemma. In an encoder, the convolution is
    centred and each direction has gates and decays of its own, as both directions of Vision Mamba and Hydra have. The
    gate weights are plain parameters: they stay in full precision in a ternary encoder.
    """

    parameter_group: ClassVar[str] = "mamba"
    positions: ClassVar[tuple[str, ...]] = ("rope", "hope", "none")  # the decays tell positions; it uses none of these

    @dataclass(frozen=True)
    class Options:
        """Options of `griffin`."""

        expand: float = option(1.0, "Width of the recurrence, relative to hidden_size.", exclusiveMinimum=0.0)
        conv_size: int = option(4, "Tokens that the short convolution covers one way.", minimum=1)
        separate_gates: bool = option(True, "Give each direction of an encoder gates and decays of its own.")

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        self.causal, self.num_heads = context.causal, context.num_heads
        self.width = round(context.hidden_size * options.expand)
        if self.width == 0 or self.width % self.num_heads:
            raise FrankensteinError(
                f"model.mixers.griffin.expand={options.expand} makes {self.width} channels of "
                f"hidden_size={context.hidden_size}; expected a multiple of num_heads={self.num_heads}"
            )
        self.project = nn.Linear(context.hidden_size, 2 * self.width)
        self.conv = ShortConv(self.width, options.conv_size, causal=self.causal, bias=True)
        directions = 2 if options.separate_gates and not self.causal else 1
        block = self.width // self.num_heads
        # per direction a recurrence gate, then an input gate
        self.gate_weight = nn.Parameter(
            torch.empty(self.num_heads, block, 2 * directions * block).normal_(std=block**-0.5)
        )
        self.gate_bias = nn.Parameter(torch.zeros(2 * directions, self.width))
        self.a_param = nn.Parameter(_initial_a_param(directions, self.width))
        self.out = nn.Linear(self.width, context.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        x, gelu = self.project(x).chunk(2, -1)
        x = self.conv(x, mask)
        a_gate, input_gate, *back = self.gates(x)
        if self.causal:  # padding comes last, so that no real token sees it
            h, _ = rg_lru(x, a_gate, input_gate, self.a_param[0])
        elif back:
            h = bidirectional_rg_lru(
                x,
                a_gate,
                input_gate,
                self.a_param[0],
                a_gate_rev=back[0],
                input_gate_rev=back[1],
                a_param_rev=self.a_param[1],
                mask=mask,
            )
        else:
            h = bidirectional_rg_lru(x, a_gate, input_gate, self.a_param[0], mask=mask)
        return self.out(h * F.gelu(gelu, approximate="tanh"))

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, T, D) of the recurrence gate and the input gate of every direction."""
        heads = x.unflatten(-1, (self.num_heads, -1)).flatten(0, 1).transpose(0, 1)
        logits = (heads @ self.gate_weight).unflatten(-1, (len(self.gate_bias), -1))
        logits = logits.permute(2, 1, 0, 3).flatten(2).unflatten(1, x.shape[:2])
        return (logits + self.gate_bias[:, None, None]).unbind(0)


def _initial_a_param(directions: int, width: int) -> Tensor:
    """Such that the strongest decay, a_t where r_t = 1, is uniform in [0.9, 0.999]: section 2.4."""
    strongest = torch.empty(directions, width).uniform_(0.9, 0.999)
    return torch.expm1(-strongest.log() / SHARPNESS).log()
