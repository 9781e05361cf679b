"""The frozen numbers come from fla-org/flash-linear-attention@bc3b101, fla/ops/delta_rule/naive.py and
fla/ops/gated_delta_rule/naive.py, run in float64; the bidirectional ones by y = f(x) + flip(f(flip x)) - f1(x).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.mixers import delta_chunks
from frankenstein.mixers.delta_rule import (
    bidirectional_delta_rule,
    bidirectional_gated_delta_rule,
    delta_rule,
    delta_rule_recurrent,
    gated_delta_rule,
    gated_delta_rule_recurrent,
)

F64 = torch.float64
CAUSAL = {False: (delta_rule, delta_rule_recurrent), True: (gated_delta_rule, gated_delta_rule_recurrent)}
BOTH_WAYS = {False: bidirectional_delta_rule, True: bidirectional_gated_delta_rule}
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])


def random_inputs(length: int, *, gated: bool, seed: int = 3) -> list[torch.Tensor]:
    """q, k, v, (g,) beta."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, 3, width, generator=draw, dtype=F64) for width in (4, 4, 5))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = torch.randn(2, length, 3, generator=draw, dtype=F64).sigmoid().log()
    beta = torch.rand(2, length, 3, generator=draw, dtype=F64)
    return [x.requires_grad_() for x in ([q, k, v, g, beta] if gated else [q, k, v, beta])]


def random_state() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)


def by_the_rule(rule: Callable, inputs: list[torch.Tensor], reverse: list[torch.Tensor]) -> torch.Tensor:
    """f(x) + flip(f(flip x)) - f1(x), token by token."""
    backward = rule(*(x.flip(1) for x in reverse))[0].flip(1)
    alone = torch.cat([rule(*(x[:, t : t + 1] for x in inputs))[0] for t in range(inputs[0].shape[1])], 1)
    return rule(*inputs)[0] + backward - alone


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@gated_or_not
@pytest.mark.parametrize("length", [1, 7, 16, 33])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 128])
def test_chunked_equals_recurrent_with_states_and_gradients(length: int, chunk_size: int, gated: bool) -> None:
    results = []
    for function, extra in zip(CAUSAL[gated], ({"chunk_size": chunk_size}, {}), strict=True):
        inputs, state = random_inputs(length, gated=gated), random_state()
        o, final = function(*inputs, scale=0.7, initial_state=state, output_final_state=True, **extra)
        grads = torch.autograd.grad(o.sin().sum() + final.cos().sum(), (*inputs, state))
        results.append((o, final, *grads))
    assert_same(results)


@gated_or_not
def test_a_row_too_big_for_one_segment_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    results = []
    for segment in (2 * 3 * 8, 1 << 20):
        monkeypatch.setattr(delta_chunks, "SEGMENT", segment)
        inputs, state = random_inputs(37, gated=gated), random_state()
        o, final = CAUSAL[gated][0](*inputs, initial_state=state, output_final_state=True, chunk_size=4)
        results.append((o, final, *torch.autograd.grad(o.sin().sum() + final.cos().sum(), (*inputs, state))))
    assert_same(results)


@gated_or_not
def test_without_states_the_final_state_is_none_and_two_halves_make_a_whole(gated: bool) -> None:
    inputs, (fast, _) = random_inputs(21, gated=gated), CAUSAL[gated]
    whole, nothing = fast(*inputs, chunk_size=8)
    assert nothing is None
    first, state = fast(*(x[:, :10] for x in inputs), output_final_state=True)
    second, _ = fast(*(x[:, 10:] for x in inputs), initial_state=state, chunk_size=4)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


@gated_or_not
@pytest.mark.parametrize("length", [1, 9, 33])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_bidirectional_equals_the_rule_with_gradients(length: int, separate: bool, gated: bool) -> None:
    results = []
    for fast in (True, False):
        inputs, other = random_inputs(length, gated=gated), random_inputs(length, gated=gated, seed=8)
        names = ("g_rev", "beta_rev") if gated else ("beta_rev",)
        reverse = dict(zip(names, other[3:], strict=True)) if separate else {}
        if fast:
            o = BOTH_WAYS[gated](*inputs, **reverse, chunk_size=8)
        else:
            o = by_the_rule(CAUSAL[gated][1], inputs, [*inputs[:3], *(reverse.values() or inputs[3:])])
        results.append((o, *torch.autograd.grad(o.sin().sum(), (*inputs, *reverse.values()))))
    assert_same(results)


@gated_or_not
@pytest.mark.parametrize("chunk_size", [3, 32])
def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient(chunk_size: int, gated: bool) -> None:
    inputs, both_ways = random_inputs(12, gated=gated), BOTH_WAYS[gated]
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = both_ways(*inputs, mask=mask, chunk_size=chunk_size)
    torch.testing.assert_close(o[1:, :7], both_ways(*(x[1:, :7] for x in inputs), chunk_size=chunk_size))
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), inputs):
        assert grad[1, 7:].abs().max() == 0 and grad[1, :7].abs().min() > 0


@gated_or_not
def test_reversing_the_input_reverses_the_output(gated: bool) -> None:
    inputs, both_ways = random_inputs(17, gated=gated), BOTH_WAYS[gated]
    torch.testing.assert_close(both_ways(*(x.flip(1) for x in inputs)).flip(1), both_ways(*inputs))


def test_without_decay_the_gated_rule_is_the_delta_rule() -> None:
    q, k, v, beta = random_inputs(19, gated=False)
    none = torch.zeros_like(beta)
    torch.testing.assert_close(gated_delta_rule(q, k, v, none, beta)[0], delta_rule(q, k, v, beta)[0])
    both = bidirectional_gated_delta_rule(q, k, v, none, beta)
    torch.testing.assert_close(both, bidirectional_delta_rule(q, k, v, beta))


def test_with_total_decay_every_token_is_alone() -> None:
    q, k, v, g, beta = random_inputs(19, gated=True)
    alone = (q * k).sum(-1, keepdim=True) * 4**-0.5 * beta[..., None] * v
    o = bidirectional_gated_delta_rule(q, k, v, torch.full_like(g, -900.0), beta, chunk_size=8)
    torch.testing.assert_close(o, alone)


def test_a_value_is_read_back_as_written_and_a_second_one_replaces_it() -> None:
    keys = torch.eye(4, dtype=F64)[[0, 1, 2, 0, 3, 1]].view(1, 6, 1, 4)
    v = torch.randn(1, 6, 1, 5, dtype=F64)
    ones = torch.ones(1, 6, 1, dtype=F64)
    o, state = delta_rule(keys, keys, v, ones, scale=1.0, output_final_state=True, chunk_size=4)
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(state[0, 0], v[0, [3, 5, 2, 4], 0])  # the last value of each key


def test_without_writing_the_state_only_decays() -> None:
    q, k, v, g, beta = random_inputs(9, gated=True)
    start = random_state()
    o, state = gated_delta_rule(
        q, k, v, g, torch.zeros_like(beta), initial_state=start, output_final_state=True, chunk_size=4
    )
    torch.testing.assert_close(state, g.sum(1)[..., None, None].exp() * start)
    faded = g.cumsum(1).exp()[..., None] * torch.einsum("bthk,bhkv->bthv", q, start)
    torch.testing.assert_close(o, 4**-0.5 * faded)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype) -> None:
    results = []
    for function in (gated_delta_rule, gated_delta_rule_recurrent):
        q, k, v, _, beta = (x.detach().to(dtype).requires_grad_() for x in random_inputs(130, gated=True))
        g = torch.full((2, 130, 3), -3.0, dtype=dtype, requires_grad=True)
        o, _ = function(q, k, v, g, beta)
        results.append((o, *torch.autograd.grad(o.sum(), (q, k, v, g, beta))))
    for fast, plain in zip(*results, strict=True):
        assert torch.isfinite(fast).all() and fast.dtype == dtype
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@gated_or_not
def test_equal_keys_do_not_spoil_single_precision(gated: bool) -> None:
    q, _, v, *gates = (x.detach() for x in random_inputs(128, gated=gated))
    k = torch.ones_like(q) / 2
    gates[-1] = torch.full_like(gates[-1], 1.9)
    exact, _ = CAUSAL[gated][1](q, k, v, *gates)
    o, _ = CAUSAL[gated][0](*(x.float() for x in (q, k, v, *gates)), chunk_size=64)
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_float32_also_inside_autocast() -> None:
    halves = [x.detach().bfloat16().requires_grad_() for x in random_inputs(40, gated=True)]
    with torch.autocast("cpu", torch.bfloat16):
        o = bidirectional_gated_delta_rule(*halves)
        grads = torch.autograd.grad(o.float().sum(), halves)
    wide = [x.detach().float().requires_grad_() for x in halves]
    exact = bidirectional_gated_delta_rule(*wide)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.float(), exact, rtol=0.02, atol=0.01)
    for half, full in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02 * full.abs().max().item())


@gated_or_not
def test_a_second_derivative_is_refused_instead_of_wrong(gated: bool) -> None:
    inputs = random_inputs(9, gated=gated)
    o, _ = CAUSAL[gated][0](*inputs)
    (grad,) = torch.autograd.grad(o.sin().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("function", [*(f for f, _ in CAUSAL.values()), *BOTH_WAYS.values()], ids=lambda f: f.__name__)
def test_values_and_gradients_equal_published_code(function: Callable, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{function.__name__}.safetensors")
    inputs = {k: v for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    inputs = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    if "initial_state" in case:
        o, state = function(**inputs, output_final_state=True)
        outputs = {"o": o, "final_state": state}
    else:
        outputs = {"o": function(**inputs)}
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    sum((x * case[f"w_{name}"].to(dtype)).sum() for name, x in outputs.items()).backward()
    outputs |= {f"grad_{name}": x.grad for name, x in inputs.items() if x.is_floating_point()}
    expected = {name.removeprefix("expected_"): x for name, x in case.items() if name.startswith("expected_")}
    assert outputs.keys() == expected.keys()
    for name, x in outputs.items():
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), expected[name], rtol=tolerance, atol=tolerance)
