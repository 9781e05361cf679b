"""Linear attention with a decay per head. Frozen numbers: fla-org/flash-linear-attention@bc3b101, one head of
naive_recurrent_simple_gla in float64 (both directions by y = f(x) + flip(f(flip x)) - f1(x)), as simple_gla.safetensors
and bidirectional_simple_gla.safetensors.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.mixers.gla import bidirectional_gla, gla
from frankenstein.mixers.retnet import bidirectional_retention, retention
from frankenstein.mixers.simple_gla import (
    bidirectional_simple_gla,
    bidirectional_simple_gla_recurrent,
    simple_gla,
    simple_gla_recurrent,
)

F64 = torch.float64
SHAPES = {"q": (3, 4), "k": (3, 4), "v": (3, 5), "g": (3,), "g_rev": (3,)}


def random_inputs(length: int, names: str = "q k v g", batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = {n: torch.randn(batch, length, *SHAPES[n], generator=generator, dtype=F64) for n in names.split()}
    return {n: (-x.abs() * x.abs() if n.startswith("g") else x).requires_grad_() for n, x in inputs.items()}


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 33, 150])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_chunked_equals_recurrent_with_states_and_gradients(length: int, chunk_size: int) -> None:
    results = []
    for function, extra in ((simple_gla, {"chunk_size": chunk_size}), (simple_gla_recurrent, {})):
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
    for function, extra in (
        (bidirectional_simple_gla, {"chunk_size": chunk_size}),
        (bidirectional_simple_gla_recurrent, {}),
    ):
        inputs = random_inputs(length, names)
        o = function(**inputs, mask=mask, **extra)
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    assert_same(results)


def test_a_single_head_of_a_single_row_works() -> None:
    inputs = {n: x[:1, :, :1] for n, x in random_inputs(20).items()}
    torch.testing.assert_close(bidirectional_simple_gla(**inputs), bidirectional_simple_gla_recurrent(**inputs))


def test_without_states_the_final_state_is_none_and_two_halves_make_a_whole() -> None:
    inputs = random_inputs(45)
    whole, nothing = simple_gla(**inputs, chunk_size=16)
    assert nothing is None
    first, state = simple_gla(**{n: x[:, :10] for n, x in inputs.items()}, output_final_state=True)
    second, _ = simple_gla(**{n: x[:, 10:] for n, x in inputs.items()}, initial_state=state, chunk_size=4)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_padded_rows_touch_no_gradient_and_come_out_as_zero() -> None:
    inputs = random_inputs(12, "q k v g g_rev")
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_simple_gla(**inputs, mask=mask, chunk_size=4)
    alone = bidirectional_simple_gla(**{n: x[1:, :7] for n, x in inputs.items()})
    torch.testing.assert_close(o[1:, :7], alone)
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), tuple(inputs.values())):
        assert grad[1, 7:].abs().max() == 0


def test_reversing_the_input_reverses_the_output() -> None:
    inputs = random_inputs(37)
    o = bidirectional_simple_gla(**inputs, chunk_size=8)
    torch.testing.assert_close(bidirectional_simple_gla(**{n: x.flip(1) for n, x in inputs.items()}).flip(1), o)


def test_with_a_constant_decay_it_is_retention() -> None:
    q, k, v, _ = random_inputs(39).values()
    log_gamma = torch.tensor([-0.03, -0.5, -3.0], dtype=F64)
    g = log_gamma.expand(2, 39, 3)
    torch.testing.assert_close(simple_gla(q, k, v, g)[0], retention(q, k, v, log_gamma)[0])
    torch.testing.assert_close(bidirectional_simple_gla(q, k, v, g), bidirectional_retention(q, k, v, log_gamma))


def test_it_is_gated_linear_attention_with_equal_channels() -> None:
    inputs = random_inputs(39)
    wide = {**inputs, "g": inputs["g"].unsqueeze(-1).expand(2, 39, 3, 4)}
    torch.testing.assert_close(simple_gla(**inputs)[0], gla(**wide)[0])
    torch.testing.assert_close(bidirectional_simple_gla(**inputs), bidirectional_gla(**wide))


@pytest.mark.parametrize("decay", [-900.0, float("-inf")])
def test_with_total_decay_every_token_is_alone(decay: float) -> None:
    q, k, v, g = random_inputs(39).values()
    g = torch.full_like(g, decay).requires_grad_()
    o = bidirectional_simple_gla(q, k, v, g, chunk_size=16)
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * 4**-0.5 * v)
    for grad in torch.autograd.grad(o.sin().sum(), (q, k, v, g)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype) -> None:
    inputs = {n: x.detach().to(dtype) for n, x in random_inputs(130, "q k v").items()}
    inputs = {n: x.requires_grad_() for n, x in {**inputs, "g": torch.full((2, 130, 3), -3.0, dtype=dtype)}.items()}
    results = []
    for one_way, both_ways in (
        (simple_gla, bidirectional_simple_gla),
        (simple_gla_recurrent, bidirectional_simple_gla_recurrent),
    ):
        o = one_way(**inputs)[0] + both_ways(**inputs)
        assert o.dtype == dtype
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    for fast, plain in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    inputs = {n: x.detach().bfloat16() for n, x in random_inputs(100).items()}
    exact, _ = simple_gla(**{n: x.float() for n, x in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simple_gla(**inputs)[0], exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["simple_gla", "bidirectional_simple_gla"])
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    inputs = {k: v for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    inputs = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    if name == "simple_gla":
        outputs = dict(zip(("o", "final_state"), simple_gla(**inputs, output_final_state=True), strict=True))
    else:
        outputs = {"o": bidirectional_simple_gla(**inputs)}
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for key, value in outputs.items():
        torch.testing.assert_close(value.double(), case[f"expected_{key}"], **tolerance)
    sum((value * case[f"w_{key}"].to(dtype)).sum() for key, value in outputs.items()).backward()
    checked = [key for key in inputs if key != "mask"]
    assert len(checked) >= 4
    for key in checked:
        torch.testing.assert_close(inputs[key].grad.double(), case[f"expected_grad_{key}"], **tolerance)
