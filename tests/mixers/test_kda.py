"""The frozen numbers come from naive_recurrent_kda of fla-org/flash-linear-attention@bc3b101, in float64:

    git show bc3b101:fla/ops/kda/naive.py | sed 's/torch\\.float\\b/torch.float64/g' > naive_kda.py
    torch.manual_seed(0)        # q, k, v, g = logsigmoid(randn), beta = rand, initial_state; q and k normalized
    naive_recurrent_kda(**inputs, output_final_state=True)

and the gradients of sum(w_o * o) + sum(w_final_state * final_state); the bidirectional ones by the rule
y = f(x) + flip(f(flip x)) - f1(x), every token alone as a batch of rows of one token.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import delta_chunks
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.delta_rule import bidirectional_gated_delta_rule, gated_delta_rule
from frankenstein.mixers.kda import KimiDeltaAttention, bidirectional_kda, kda, kda_recurrent

F64 = torch.float64


def random_inputs(length: int, *, seed: int = 3) -> list[torch.Tensor]:
    """q, k, v, g, beta."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(2, length, 3, width, generator=draw, dtype=F64) for width in (4, 4, 5, 4))
    beta = torch.rand(2, length, 3, generator=draw, dtype=F64)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return [x.requires_grad_() for x in (q, k, v, 3 * F.logsigmoid(g), beta)]


def random_state() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 16, 33])
@pytest.mark.parametrize("chunk_size", [1, 2, 8, 64])
def test_chunked_equals_recurrent_with_states_and_gradients(length: int, chunk_size: int) -> None:
    results = []
    for function, extra in ((kda, {"chunk_size": chunk_size}), (kda_recurrent, {})):
        inputs, state = [x.detach().requires_grad_() for x in random_inputs(length)], random_state()
        o, final = function(*inputs, scale=0.7, initial_state=state, output_final_state=True, **extra)
        grads = torch.autograd.grad(o.sin().sum() + final.cos().sum(), (*inputs, state))
        results.append((o, final, *grads))
    assert_same(results)


def test_a_row_too_big_for_one_segment_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for segment in (2 * 3 * 8, 1 << 20):
        monkeypatch.setattr(delta_chunks, "SEGMENT", segment)
        inputs = random_inputs(37)
        o, final = kda(*inputs, output_final_state=True, chunk_size=4)
        results.append((o, final, *torch.autograd.grad(o.sin().sum() + final.cos().sum(), inputs)))
    assert_same(results)


def test_without_states_the_final_state_is_none_and_two_halves_make_a_whole() -> None:
    inputs = random_inputs(21)
    whole, nothing = kda(*inputs, chunk_size=8)
    assert nothing is None
    first, state = kda(*(x[:, :10] for x in inputs), output_final_state=True)
    second, _ = kda(*(x[:, 10:] for x in inputs), initial_state=state, chunk_size=4)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("length", [1, 9, 33])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_bidirectional_equals_the_rule_with_gradients(length: int, separate: bool) -> None:
    results = []
    for fast in (True, False):
        inputs, other = random_inputs(length), random_inputs(length, seed=8)
        q, k, v, g, beta = inputs
        g_rev, beta_rev = other[3:] if separate else (g, beta)
        if fast:
            o = bidirectional_kda(q, k, v, g, beta, **({"g_rev": g_rev, "beta_rev": beta_rev} if separate else {}))
        else:
            forward, _ = kda_recurrent(*inputs)
            backward, _ = kda_recurrent(*(x.flip(1) for x in (q, k, v, g_rev, beta_rev)))
            alone = torch.cat([kda_recurrent(*(x[:, t : t + 1] for x in inputs))[0] for t in range(length)], 1)
            o = forward + backward.flip(1) - alone
        used = (q, k, v, beta, beta_rev) if length == 1 else (*inputs, g_rev, beta_rev)
        results.append((o, *torch.autograd.grad(o.sin().sum(), used)))
    assert_same(results)


@pytest.mark.parametrize("chunk_size", [2, 32])
def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient(chunk_size: int) -> None:
    inputs = random_inputs(12)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_kda(*inputs, mask=mask, chunk_size=chunk_size)
    torch.testing.assert_close(o[1:, :7], bidirectional_kda(*(x[1:, :7] for x in inputs), chunk_size=chunk_size))
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), inputs):
        assert grad[1, 7:].abs().max() == 0 and grad[1, :7].abs().max() > 0


def test_reversing_the_input_reverses_the_output() -> None:
    inputs = random_inputs(17)
    flipped = bidirectional_kda(*(x.flip(1) for x in inputs))
    torch.testing.assert_close(flipped.flip(1), bidirectional_kda(*inputs))


def test_with_the_same_decay_in_all_channels_it_is_the_gated_delta_rule() -> None:
    q, k, v, g, beta = random_inputs(19)
    same = g[..., :1].expand_as(g)
    torch.testing.assert_close(kda(q, k, v, same, beta)[0], gated_delta_rule(q, k, v, g[..., 0], beta)[0])
    both = bidirectional_kda(q, k, v, same, beta, chunk_size=4)
    torch.testing.assert_close(both, bidirectional_gated_delta_rule(q, k, v, g[..., 0], beta))


def test_a_channel_that_forgets_all_keeps_only_its_own_token() -> None:
    q, k, v, g, beta = (x.detach() for x in random_inputs(19))
    q[..., 1:] = 0  # reads channel 0 only
    g[..., 0] = -900.0
    reading, _ = kda(q, k, v, g, beta)
    error = v.clone()
    state = torch.zeros(2, 3, 4, 5, dtype=F64)
    for t in range(19):  # what channel 0 has written before t is gone, the others go on
        state = state * g[:, t, :, :, None].exp()
        assert state[:, :, 0].abs().max() == 0
        error[:, t] -= torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * error[:, t, :, None]
    torch.testing.assert_close(reading, 4**-0.5 * (q[..., :1] * k[..., :1]) * beta[..., None] * error)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype) -> None:
    results = []
    for function in (kda, kda_recurrent):
        q, k, v, g, beta = (x.detach().to(dtype).requires_grad_() for x in random_inputs(130))
        g = torch.full_like(g, -3.0).index_fill(1, torch.tensor([40, 41]), -60.0).requires_grad_()
        o, _ = function(q, k, v, g, beta)
        results.append((o, *torch.autograd.grad(o.sum(), (q, k, v, g, beta))))
    for fast, plain in zip(*results, strict=True):
        assert torch.isfinite(fast).all() and fast.dtype == dtype
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_in_float32_also_inside_autocast() -> None:
    halves = [x.detach().bfloat16().requires_grad_() for x in random_inputs(40)]
    with torch.autocast("cpu", torch.bfloat16):
        o = bidirectional_kda(*halves)
        grads = torch.autograd.grad(o.float().sum(), halves)
    wide = [x.detach().float().requires_grad_() for x in halves]
    exact = bidirectional_kda(*wide)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.float(), exact, rtol=0.02, atol=0.01)
    for half, full in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02 * full.abs().max().item())


def test_a_chunk_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(FrankensteinError, match="chunk_size=12 is not a power of two"):
        kda(*random_inputs(5), chunk_size=12)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("function", [kda, bidirectional_kda], ids=lambda f: f.__name__)
def test_values_and_gradients_equal_published_code(function: Callable, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{function.__name__}.safetensors")
    inputs = {k: v.to(dtype).requires_grad_() for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    if function is kda:
        outputs = dict(zip(("o", "final_state"), kda(**inputs, output_final_state=True, chunk_size=16), strict=True))
    else:
        outputs = {"o": bidirectional_kda(**inputs, chunk_size=16)}
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    sum((x * case[f"w_{name}"].to(dtype)).sum() for name, x in outputs.items()).backward()
    outputs |= {f"grad_{name}": x.grad for name, x in inputs.items()}
    expected = {name.removeprefix("expected_"): x for name, x in case.items() if name.startswith("expected_")}
    assert outputs.keys() == expected.keys()
    for name, x in outputs.items():
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), expected[name], rtol=tolerance, atol=tolerance)


def layer(*, causal: bool = False, **options: object) -> KimiDeltaAttention:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, causal, 16, 0, None)
    return KimiDeltaAttention(context, KimiDeltaAttention.Options(**options)).double()


def tokens() -> torch.Tensor:
    return torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_authors_equation(causal: bool) -> None:
    mixer, x = layer(causal=causal, separate_directions=not causal), tokens()
    for name, parameter in mixer.named_parameters():
        if name not in ("A_log", "dt_bias"):
            torch.nn.init.normal_(parameter, std=0.7)
    q, k, v = F.silu(mixer.project.conv(x @ mixer.project.linear.weight.T)).view(2, 9, 3, 2, 4).unbind(2)
    q, k = (a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    low = x @ mixer.decay_down.T

    def gate(direction: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = mixer.decay_up[8 * direction : 8 * direction + 8]
        raw = (low @ rows.T).view(2, 9, 2, 4) + mixer.dt_bias[direction]
        beta = 1 / (1 + (-x @ mixer.beta[2 * direction : 2 * direction + 2].T).exp())
        return -mixer.A_log[direction].exp() * (1 + raw.exp()).log(), beta

    o, _ = kda_recurrent(q, k, v, *gate(0))
    if not causal:
        backward, _ = kda_recurrent(*(a.flip(1) for a in (q, k, v, *gate(1))))
        o = o + backward.flip(1) - 0.5 * (gate(0)[1] * (q * k).sum(-1))[..., None] * v
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    opened = (x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T + mixer.gate_up.bias).sigmoid()
    torch.testing.assert_close(mixer(x), (o.flatten(2) * opened) @ mixer.out.weight.T)


def test_decays_start_where_the_authors_start_them() -> None:
    mixer = layer(head_dim=100)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 0.001 - 1e-9 and dt.max() <= 0.1 + 1e-9
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16


def test_options_change_what_they_say() -> None:
    x = tokens()
    for name, value in {"conv_size": 0, "allow_neg_eigval": True}.items():
        mixer, known = layer(**{name: value}), layer()
        known.load_state_dict(mixer.state_dict(), strict=False)
        assert not torch.allclose(mixer(x), known(x)), name
    assert layer(head_dim=6, expand_v=1.5).project.widths == (24, 18)
    with pytest.raises(FrankensteinError, match=r"kda_attn.expand_v=1.3 gives 5.2 value channels for 4 key channels"):
        layer(expand_v=1.3)
    with pytest.raises(FrankensteinError, match=r"kda_attn.separate_directions needs model.causal: false"):
        layer(causal=True, separate_directions=True)
