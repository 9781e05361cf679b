"""Gated linear attention. Frozen numbers: fla-org/flash-linear-attention@bc3b101, naive_recurrent_gla in float64 (both
directions by y = f(x) + flip(f(flip x)) - f1(x)), as gla.safetensors and bidirectional_gla.safetensors.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import chunked_gla
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.gla import (
    GatedLinearAttention,
    bidirectional_gla,
    bidirectional_gla_recurrent,
    gla,
    gla_recurrent,
)

F64 = torch.float64
SHAPES = {"q": (3, 4), "k": (3, 4), "v": (3, 5), "g": (3, 4), "g_rev": (3, 4)}


def random_inputs(length: int, names: str = "q k v g", batch: int = 2) -> dict[str, torch.Tensor]:
    """Log decays from nearly 0 to about -3 a step."""
    generator = torch.Generator().manual_seed(3)
    inputs = {n: torch.randn(batch, length, *SHAPES[n], generator=generator, dtype=F64) for n in names.split()}
    return {n: (-x.abs() * x.abs() if n.startswith("g") else x).requires_grad_() for n, x in inputs.items()}


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 33, 70, 150])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
def test_chunked_equals_recurrent_with_states_and_gradients(length: int, chunk_size: int) -> None:
    results = []
    for function, extra in ((gla, {"chunk_size": chunk_size}), (gla_recurrent, {})):
        inputs = random_inputs(length)
        state = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
        o, final = function(**inputs, initial_state=state, output_final_state=True, scale=0.7, **extra)
        grads = torch.autograd.grad(o.sin().sum() + final.cos().sum(), (*inputs.values(), state))
        results.append((o, final, *grads))
    assert_same(results)


@pytest.mark.parametrize("length", [1, 9, 33, 150])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("names", ["q k v g", "q k v g g_rev"], ids=["shared", "own"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_bidirectional_equals_the_rule_with_gradients(length: int, chunk_size: int, names: str, padded: bool) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]]) if padded else None
    results = []
    for function, extra in ((bidirectional_gla, {"chunk_size": chunk_size}), (bidirectional_gla_recurrent, {})):
        inputs = random_inputs(length, names)
        o = function(**inputs, mask=mask, **extra)
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    assert_same(results)


def test_many_small_parts_give_what_one_part_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (1, 1 << 20):
        monkeypatch.setattr(chunked_gla, "PART", elements)
        inputs = random_inputs(70, "q k v g g_rev")
        o = bidirectional_gla(**inputs, chunk_size=16)
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    assert_same(results)


@pytest.mark.parametrize("which", ["output", "state"])
def test_output_and_state_alone_have_right_gradients(which: str) -> None:
    results = []
    for function in (gla, gla_recurrent):
        inputs = random_inputs(21)
        o, state = function(**inputs, output_final_state=True)
        loss = o.sin().sum() if which == "output" else state.sin().sum()
        results.append(torch.autograd.grad(loss, tuple(inputs.values()), materialize_grads=True))
    assert_same(results)


def test_without_states_the_final_state_is_none_and_two_halves_make_a_whole() -> None:
    inputs = random_inputs(45)
    whole, nothing = gla(**inputs, chunk_size=16)
    assert nothing is None
    first, state = gla(**{n: x[:, :10] for n, x in inputs.items()}, output_final_state=True)
    second, _ = gla(**{n: x[:, 10:] for n, x in inputs.items()}, initial_state=state, chunk_size=4)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient(chunk_size: int) -> None:
    inputs = random_inputs(12, "q k v g g_rev")
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_gla(**inputs, mask=mask, chunk_size=chunk_size)
    alone = bidirectional_gla(**{n: x[1:, :7] for n, x in inputs.items()}, chunk_size=chunk_size)
    torch.testing.assert_close(o[1:, :7], alone)
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), tuple(inputs.values())):
        assert grad[1, 7:].abs().max() == 0


def test_reversing_the_input_reverses_the_output() -> None:
    inputs = random_inputs(37)
    o = bidirectional_gla(**inputs, chunk_size=8)
    torch.testing.assert_close(bidirectional_gla(**{n: x.flip(1) for n, x in inputs.items()}).flip(1), o)


def test_one_token_gives_the_causal_output() -> None:
    inputs = random_inputs(1)
    torch.testing.assert_close(bidirectional_gla(**inputs), gla(**inputs)[0])


def test_without_decay_it_is_linear_attention() -> None:
    q, k, v, _ = random_inputs(39).values()
    zero = torch.zeros(2, 39, 3, 4, dtype=F64)
    weights = torch.einsum("bihk,bjhk->bhij", q, k) * 4**-0.5
    both = torch.einsum("bhij,bjhv->bihv", weights, v)
    torch.testing.assert_close(bidirectional_gla(q, k, v, zero, chunk_size=16), both)
    causal = torch.einsum("bhij,bjhv->bihv", weights.tril(), v)
    torch.testing.assert_close(gla(q, k, v, zero, chunk_size=16)[0], causal)


@pytest.mark.parametrize("decay", [-900.0, float("-inf")])
def test_with_total_decay_every_token_is_alone(decay: float) -> None:
    q, k, v, g = random_inputs(39).values()
    g = torch.full_like(g, decay).requires_grad_()
    o = bidirectional_gla(q, k, v, g, chunk_size=16)
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * 4**-0.5 * v)
    for grad in torch.autograd.grad(o.sin().sum(), (q, k, v, g)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype) -> None:
    inputs = {n: x.detach().to(dtype) for n, x in random_inputs(130, "q k v").items()}
    inputs["g"] = torch.full((2, 130, 3, 4), -3.0, dtype=dtype)
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    results = []
    for one_way, both_ways in ((gla, bidirectional_gla), (gla_recurrent, bidirectional_gla_recurrent)):
        o = one_way(**inputs)[0] + both_ways(**inputs)
        assert o.dtype == dtype
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    for fast, plain in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_weak_decay_after_a_total_reset_keeps_full_precision() -> None:
    """Differences of cumulated log decays would lose about 1e-3 here in float32."""
    inputs = {n: x.detach().float() for n, x in random_inputs(64, "q k v").items()}
    g = torch.full((2, 64, 3, 4), -0.05)
    g[:, 5::7] = -1e4
    expected = gla_recurrent(**{n: x.double() for n, x in inputs.items()}, g=g.double())[0]
    torch.testing.assert_close(gla(**inputs, g=g)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    inputs = {n: x.detach().bfloat16() for n, x in random_inputs(100).items()}
    o, state = gla(**inputs, output_final_state=True)
    exact, _ = gla(**{n: x.float() for n, x in inputs.items()})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(o, exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gla(**inputs)[0], o)


@pytest.mark.parametrize("chunk_size", [0, 48])
def test_a_chunk_size_that_is_no_power_of_two_is_refused(chunk_size: int) -> None:
    with pytest.raises(FrankensteinError, match=f"chunk_size={chunk_size} is not a power of two"):
        gla(**random_inputs(5), chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["gla", "bidirectional_gla"])
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    inputs = {k: v.to(dtype).requires_grad_() for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    if name == "gla":
        outputs = dict(zip(("o", "final_state"), gla(**inputs, output_final_state=True), strict=True))
    else:
        outputs = {"o": bidirectional_gla(**inputs)}
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for key, value in outputs.items():
        torch.testing.assert_close(value.double(), case[f"expected_{key}"], **tolerance)
    sum((value * case[f"w_{key}"].to(dtype)).sum() for key, value in outputs.items()).backward()
    for key, value in inputs.items():
        torch.testing.assert_close(value.grad.double(), case[f"expected_grad_{key}"], **tolerance)


def layer(causal: bool = False, **options: object) -> GatedLinearAttention:
    torch.manual_seed(0)
    context = MixerContext(16, 2, 2, 0.0, causal, 16, 0, None)
    mixer = GatedLinearAttention(context, GatedLinearAttention.Options(**options)).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize("separate", [True, False])
def test_the_layer_follows_the_authors_equation(separate: bool) -> None:
    mixer = layer(separate_gates=separate, gate_low_rank_dim=3, gate_logit_normalizer=2.0, expand_v=2.0)
    x = torch.randn(1, 6, 16, dtype=F64)
    q, k, v, gate = mixer.project(x)[0].split((8, 8, 32, 32), -1)
    decays = []
    for way in range(1 + separate):
        low = x[0] @ mixer.gate_down[3 * way : 3 * way + 3].T
        decays.append((low @ mixer.gate_up[way].T + mixer.gate_bias[way]).sigmoid() ** 0.5)
    o = torch.zeros(6, 2, 16, dtype=F64)
    for t in range(6):
        for s in range(6):
            a = decays[0][s + 1 : t + 1] if s <= t else decays[-1][t:s]
            weights = (q[t] * a.prod(0) * k[s]).view(2, 4).sum(-1) / 2
            o[t] += weights[:, None] * v[s].view(2, 16)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight  # per head
    expected = mixer.out(o.flatten(1) * gate * gate.sigmoid())
    torch.testing.assert_close(mixer(x)[0], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_the_short_convolution_comes_before_the_operator_and_keeps_padding_out(causal: bool) -> None:
    mixer = layer(causal, conv_size=3)
    x = torch.randn(2, 9, 16, dtype=F64)
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    torch.testing.assert_close(mixer(x, mask)[1:, :5], mixer(x[1:, :5]))
    mixed, gate = mixer.project(x).split((32, 16), -1)
    mixed = mixer.conv(mixed)
    q, k, v = (mixed * mixed.sigmoid()).split((8, 8, 16), -1)
    heads = {"q": q, "k": k, "v": v}
    heads = {n: part.view(2, 9, 2, -1) for n, part in heads.items()}
    decays = mixer.log_decays(x)
    plain = (
        gla_recurrent(**heads, g=decays[0])[0]
        if causal
        else bidirectional_gla_recurrent(**heads, g=decays[0], g_rev=decays[1])
    )
    expected = mixer.out(mixer.norm(plain).flatten(2) * gate * gate.sigmoid())
    torch.testing.assert_close(mixer(x), expected)


def test_a_fresh_layer_forgets_slowly_and_knows_its_directions() -> None:
    context = MixerContext(16, 2, 2, 0.0, False, 16, 0, None)
    mixer = GatedLinearAttention(context, GatedLinearAttention.Options())
    forward, backward = mixer.log_decays(torch.randn(1, 4, 16))
    assert ((forward < -0.03) & (forward > -0.06)).all()  # log(1/2) / 16 a step
    assert not torch.equal(forward, backward)
    assert len(layer(causal=True).log_decays(torch.randn(1, 4, 16, dtype=F64))) == 1


def test_widths_that_do_not_fit_the_heads_are_refused_by_name() -> None:
    message = (
        r"model.mixers.gla_attn.expand_k=0.3 makes 5 channels of hidden_size=16; expected a multiple of num_heads=2"
    )
    with pytest.raises(FrankensteinError, match=message):
        layer(expand_k=0.3)
