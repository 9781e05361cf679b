import math

import pytest
import torch
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, MixerContext
from frankenstein.mixers.mamba import Mamba
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions

WIDTH = 6


def layer(*, causal: bool = False, width: int = WIDTH, **options: object) -> Mamba:
    torch.manual_seed(0)
    mixer = Mamba(MixerContext(width, 2, 2, 0.0, causal, 16, 0, None), Mamba.Options(**options)).double()
    for name in ("conv.bias", "D"):
        nn.init.normal_(mixer.get_parameter(name))
    return mixer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def selected(mixer: Mamba, u: Tensor, direction: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes (F,), B (N,) and C (N,) of one token u (F,)."""
    inner, states = mixer.A_log.shape[1:]
    rank = mixer.dt_up.shape[-1]
    B, C = mixer.bc_proj.weight.view(-1, 2, states, inner)[direction] @ u
    low = mixer.dt_down.view(-1, rank, inner)[direction] @ u
    return torch.log(1 + torch.exp(mixer.dt_up[direction] @ low + mixer.dt_bias[direction])), B, C


def scan(mixer: Mamba, u: Tensor, direction: int, order: range) -> Tensor:
    """The recurrence on one sequence u (T, F), a token, a channel and a state at a time."""
    inner, states = mixer.A_log.shape[1:]
    h = torch.zeros(inner, states, dtype=u.dtype)
    y = torch.zeros_like(u)
    for t in order:
        dt, B, C = selected(mixer, u[t], direction)
        for channel in range(inner):
            for n in range(states):
                rate = -math.exp(mixer.A_log[direction, channel, n])
                h[channel, n] = torch.exp(dt[channel] * rate) * h[channel, n] + dt[channel] * B[n] * u[t, channel]
                y[t, channel] += C[n] * h[channel, n]
    return y


@torch.no_grad()
def plain(mixer: Mamba, x: Tensor) -> Tensor:
    """The whole layer on one sequence (T, D), with loops over everything."""
    length, inner = len(x), len(mixer.D)
    projected = x @ mixer.in_proj.weight.T
    u = torch.zeros(length, inner, dtype=x.dtype)
    for t in range(length):
        u[t] = mixer.conv.bias
        for tap in range(mixer.conv.weight.shape[1]):
            s = t + tap - (mixer.conv.size - 1)
            if 0 <= s < length:
                u[t] += mixer.conv.weight[:, tap] * projected[s, :inner]
    u = silu(u)
    y = scan(mixer, u, 0, range(length)) + mixer.D * u
    if not mixer.causal:
        y += scan(mixer, u, len(mixer.A_log) - 1, range(length - 1, -1, -1))
        for t in range(length):  # both directions have counted the token itself
            dt, B, C = selected(mixer, u[t], 0)
            y[t] -= dt * u[t] * (B @ C)
    return (y * silu(projected[:, inner:])) @ mixer.out.weight.T


@pytest.mark.parametrize(
    "options", [{}, {"separate_directions": False}, {"state_size": 3, "expand": 1, "conv_size": 2}]
)
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_authors_equations(causal: bool, options: dict) -> None:
    mixer, x = layer(causal=causal, **options), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    y = mixer(x, mask)
    torch.testing.assert_close(y[0], plain(mixer, x[0]))
    torch.testing.assert_close(y[1, :4], plain(mixer, x[1, :4]))
    torch.testing.assert_close(mixer(x[:1])[0], y[0])


def test_the_initialization_is_the_authors() -> None:
    mixer = layer(width=160, dt_min=0.01, dt_max=0.05)
    assert mixer.dt_up.shape == (2, 320, 10)
    assert mixer.dt_up.abs().max() <= 10**-0.5
    assert mixer.dt_up.std().item() == pytest.approx(10**-0.5 / 3**0.5, rel=0.05)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 0.0099 and steps.max() <= 0.0501
    assert steps.log().mean().item() == pytest.approx((math.log(0.01) + math.log(0.05)) / 2, abs=0.1)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).double().expand(2, 320, 16))
    context = MixerContext(WIDTH, 2, 2, 0.0, False, 16, 0, None)
    assert torch.equal(Mamba(context, Mamba.Options()).D, torch.ones(2 * WIDTH))
    tiny = torch.nn.functional.softplus(layer(dt_min=1e-7, dt_max=1e-6).dt_bias)
    torch.testing.assert_close(tiny, torch.full_like(tiny, 1e-4), rtol=1e-3, atol=0.0)


def test_an_encoder_keeps_the_initialization_and_only_projections_turn_ternary() -> None:
    options = ModelOptions(vocab_size=50, hidden_size=16, num_layers=1, layer_pattern=("mamba",), ffn_hidden_size=8)
    mixer = Encoder(options, max_length=32).blocks[0].mixer
    assert isinstance(mixer, Mamba) and MIXERS["mamba"] is Mamba
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() > 9e-4 and steps.max() < 0.101
    linear = {name for name, module in mixer.named_modules() if isinstance(module, nn.Linear)}
    assert linear == {"in_proj", "bc_proj", "out"}


def test_step_sizes_and_decays_stay_in_full_precision_under_autocast() -> None:
    mixer = layer().float()
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        u, delta = mixer._step_sizes(torch.randn(1, 3, 2 * WIDTH, dtype=torch.bfloat16))
        seen = [u.dtype, *(d.dtype for d in delta)]
        assert mixer(torch.randn(1, 3, WIDTH)).dtype == torch.bfloat16
    assert seen == [torch.float32] * 3


def test_contradicting_step_sizes_are_an_error() -> None:
    with pytest.raises(FrankensteinError, match=r"model\.mixers\.mamba\.dt_min=0\.5 is larger than dt_max=0\.1"):
        layer(dt_min=0.5)
