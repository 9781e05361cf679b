"""Titans' memory against its recurrence, its limits, and numbers of the paper's equations.

titans_memory*.safetensors and bidirectional_titans_memory.safetensors hold rows and heads of cases made in float64 from
arXiv:2501.00663 eq. 8-15 with torch.func.grad for the inner gradient; `expected_grad_<input>` belong to the loss
sum(w_o * o) (+ sum(w_final_state * M) + sum(w_final_momentum * S)).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import titans_scan
from frankenstein.mixers.delta_rule import delta_rule
from frankenstein.mixers.simple_gla import simple_gla
from frankenstein.mixers.titans_blocks import plan_blocks
from frankenstein.mixers.titans_memory import (
    bidirectional_titans_memory,
    bidirectional_titans_memory_recurrent,
    titans_memory,
    titans_memory_recurrent,
)

F64 = torch.float64
TOLERANCE = {torch.float32: (1e-4, 1e-4), F64: (1e-9, 1e-9)}
NAMES = ("q", "k", "v", "theta", "alpha", "eta")


def random_inputs(length: int, *, rows: int = 2, dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    sizes = {"q": (4,), "k": (4,), "v": (5,), "theta": (), "alpha": (), "eta": ()}
    x = {name: torch.randn(rows, length, 3, *size, generator=g, dtype=F64) for name, size in sizes.items()}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    x |= {name: (x[name] + shift).sigmoid() for name, shift in (("theta", -1), ("alpha", -2), ("eta", 0))}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in x.items()}


def random_state() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)


def constant(x: dict[str, torch.Tensor], **values: float) -> dict[str, torch.Tensor]:
    return {**x, **{name: torch.full_like(x[name], value).requires_grad_() for name, value in values.items()}}


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


def with_gradients(function, x: dict[str, torch.Tensor], **extra: object) -> tuple[torch.Tensor, ...]:
    state = random_state()
    o, memory, momentum = function(**x, initial_state=state, **extra)
    loss = o.sin().sum() + memory.cos().sum() + momentum.sin().sum()
    return (o, memory, momentum, *torch.autograd.grad(loss, [*x.values(), state]))


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 50])
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_blocks_equal_the_recurrence_with_states_and_gradients(length: int, chunk_size: int, block_size: int) -> None:
    x = random_inputs(length)
    assert_same(
        [
            with_gradients(titans_memory, x, chunk_size=chunk_size, block_size=block_size),
            with_gradients(titans_memory_recurrent, x, chunk_size=chunk_size),
        ]
    )


@pytest.mark.parametrize("blocks_at_once", [1, 3, 100])
def test_blocks_taken_a_few_at_once_equal_the_recurrence(blocks_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titans_scan, "SEGMENT", blocks_at_once * 2 * 3 * 4)  # rows x tokens of a block
    x = random_inputs(33)
    assert_same(
        [
            with_gradients(f, x, **size)
            for f, size in ((titans_memory, {"block_size": 4}), (titans_memory_recurrent, {}))
        ]
    )
    mask = torch.arange(33)[None] < torch.tensor([[33], [18]])
    results = []
    for function, size in (
        (bidirectional_titans_memory, {"block_size": 4}),
        (bidirectional_titans_memory_recurrent, {}),
    ):
        o = function(**x, mask=mask, **size)
        results.append((o, *torch.autograd.grad(o.sin().sum(), list(x.values()))))
    assert_same(results)


def test_the_gradient_written_by_hand_is_that_of_finite_differences() -> None:
    x = random_inputs(7, rows=1)
    rev = [(1 - x[name]).detach().requires_grad_() for name in ("theta", "alpha", "eta")]

    def both_ways(*inputs: torch.Tensor) -> torch.Tensor:
        names = (*NAMES, "theta_rev", "alpha_rev", "eta_rev")
        return bidirectional_titans_memory(**dict(zip(names, inputs, strict=True)), block_size=3)

    def with_state(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return titans_memory(*inputs[:-1], initial_state=inputs[-1], chunk_size=2, block_size=4)

    state = random_state()[:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(both_ways, (*x.values(), *rev), fast_mode=True)
    assert torch.autograd.gradcheck(with_state, (*x.values(), state), fast_mode=True)


@pytest.mark.parametrize("length", [1, 14, 33, 49, 132, 516, 1000])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_blocks_are_whole_chunks_and_add_less_than_one_block(length: int, chunk_size: int) -> None:
    plan = plan_blocks(length, chunk_size, 32, both_ways=False)
    assert plan.size % plan.chunk_size == 0 and plan.chunk_size == min(chunk_size, length)
    assert 0 <= plan.blocks * plan.size - length < plan.size
    assert chunk_size > 1 or plan.size <= 48


@pytest.mark.parametrize("values", [{"eta": 0.0}, {"alpha": 1.0}, {"eta": 1.0, "alpha": 0.0}, {"theta": 0.0}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_gates_at_the_ends_of_their_range_are_exact_with_gradients(chunk_size: int, values: dict[str, float]) -> None:
    x = constant(random_inputs(19), **values)
    some = {**x, "eta": (x["eta"] * (torch.arange(19) % 3 > 0)[:, None]).detach().requires_grad_()}
    for inputs in (x, some):
        assert_same(
            [with_gradients(f, inputs, chunk_size=chunk_size) for f in (titans_memory, titans_memory_recurrent)]
        )


def test_the_write_is_a_gradient_step_of_the_squared_error() -> None:
    x = {name: tensor.detach() for name, tensor in random_inputs(1).items()}
    start = random_state()
    error = torch.einsum("bhk,bhkv->bhv", x["k"][:, 0], start) - x["v"][:, 0]
    (gradient,) = torch.autograd.grad(error.square().sum(), start)
    _, memory, momentum = titans_memory(**x, initial_state=start)
    theta, alpha = (x[name][:, 0, :, None, None] for name in ("theta", "alpha"))
    torch.testing.assert_close(momentum, -theta * gradient)
    torch.testing.assert_close(memory, (1 - alpha) * start - theta * gradient)


def test_without_momentum_and_forgetting_it_is_the_delta_rule() -> None:
    x = constant(random_inputs(21), eta=0.0, alpha=0.0)
    expected, state = delta_rule(x["q"], x["k"], x["v"], 2 * x["theta"], scale=1.0, output_final_state=True)
    o, memory, momentum = titans_memory(**x)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(memory, state)
    assert momentum.abs().max() > 0  # the last write


def test_without_momentum_one_chunk_is_gated_linear_attention() -> None:
    x = constant(random_inputs(21), eta=0.0)
    writes = 2 * x["theta"][..., None] * x["v"]
    expected, _ = simple_gla(x["q"], x["k"], writes, (1 - x["alpha"]).log(), scale=1.0)
    torch.testing.assert_close(titans_memory(**x, chunk_size=21)[0], expected)


def test_without_a_learning_rate_nothing_is_learned() -> None:
    x = constant(random_inputs(9), theta=0.0)
    assert titans_memory(**x)[0].abs().max() == 0
    assert bidirectional_titans_memory(**x, chunk_size=4).abs().max() == 0


def test_a_memory_with_full_rate_answers_with_the_last_value_of_a_key() -> None:
    x = constant(random_inputs(12), theta=0.5, eta=0.0, alpha=0.0)
    x["q"] = x["k"]
    torch.testing.assert_close(titans_memory(**x)[0], x["v"])


@pytest.mark.parametrize("length", [1, 9, 33])
@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("own_gates", [False, True], ids=["shared", "own_gates"])
def test_bidirectional_equals_the_rule_with_gradients(
    length: int, chunk_size: int, padded: bool, own_gates: bool
) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]]) if padded else None
    x = random_inputs(length)
    if own_gates:
        x |= {f"{name}_rev": (1 - x[name]).detach().requires_grad_() for name in ("theta", "alpha", "eta")}
    results = []
    for function in (bidirectional_titans_memory, bidirectional_titans_memory_recurrent):
        o = function(**x, mask=mask, chunk_size=chunk_size)
        results.append((o, *torch.autograd.grad(o.sin().sum(), list(x.values()))))
    assert_same(results)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient(chunk_size: int) -> None:
    x = random_inputs(12)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_titans_memory(**x, mask=mask, chunk_size=chunk_size)
    alone = bidirectional_titans_memory(**{k: t[1:, :7] for k, t in x.items()}, chunk_size=chunk_size)
    torch.testing.assert_close(o[1:, :7], alone)
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), list(x.values())):
        assert grad[1, 7:].abs().max() == 0


def test_reversing_the_input_reverses_the_output_and_one_token_is_read_once() -> None:
    x = random_inputs(17)
    o = bidirectional_titans_memory(**x, chunk_size=5)
    flipped = bidirectional_titans_memory(**{name: tensor.flip(1) for name, tensor in x.items()}, chunk_size=5)
    torch.testing.assert_close(flipped.flip(1), o)
    first = {name: tensor[:, :1] for name, tensor in x.items()}
    torch.testing.assert_close(bidirectional_titans_memory(**first), titans_memory(**first)[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype, chunk_size: int) -> None:
    x = constant(random_inputs(130, dtype=dtype), alpha=0.95, eta=0.05)
    o, _, _ = titans_memory(**x, chunk_size=chunk_size, block_size=64)
    plain, _, _ = titans_memory_recurrent(**x, chunk_size=chunk_size)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(o, plain, rtol=rtol, atol=atol)
    assert o.dtype == dtype
    for grad in torch.autograd.grad(o.sum(), list(x.values())):
        assert torch.isfinite(grad).all()


def test_autocast_changes_nothing() -> None:
    x = random_inputs(20, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o = bidirectional_titans_memory(**x)
            grads = torch.autograd.grad(o.sin().sum(), list(x.values()))
        results.append((o, *grads))
    for low, full in zip(*results, strict=True):
        assert torch.equal(low, full)


@pytest.mark.parametrize("name", ["chunk_size", "block_size"])
@pytest.mark.parametrize("operator", [titans_memory, bidirectional_titans_memory])
def test_sizes_below_one_are_refused(operator, name: str) -> None:
    with pytest.raises(FrankensteinError, match=f"{operator.__name__}: found {name}=0; expected at least 1"):
        operator(**random_inputs(3), **{name: 0})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("titans_memory", 1), ("titans_memory_chunks", 16), ("bidirectional_titans_memory", 1)],
)
def test_values_and_gradients_equal_the_papers_equations(name: str, chunk_size: int, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    x = {k: v for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    x = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in x.items()}
    if name.startswith("bidirectional"):
        outputs = {"o": bidirectional_titans_memory(**x, chunk_size=chunk_size)}
    else:
        outputs = dict(
            zip(("o", "final_state", "final_momentum"), titans_memory(**x, chunk_size=chunk_size), strict=True)
        )
    rtol, atol = TOLERANCE[dtype]
    loss = torch.zeros((), dtype=dtype)
    for key, value in outputs.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), case[f"expected_{key}"], rtol=rtol, atol=atol)
        loss = loss + (value * case[f"w_{key}"].to(dtype)).sum()
    loss.backward()
    for key in (*NAMES, *(["initial_state"] if "initial_state" in x else [])):
        torch.testing.assert_close(x[key].grad.double(), case[f"expected_grad_{key}"], rtol=rtol, atol=atol)
