"""The solvers against exact discrete solutions, the layer against attention with explicit weights W(t).

ode_solve.safetensors: f(t, z) = z A^T; `expected_<solver>_<steps>` are the stability polynomial of A / steps to the
power of steps, `expected_exact` is scipy.linalg.expm (scipy 1.17.1), in float64.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.hope import Hope
from frankenstein.mixers.ode import NeuralODEAttention, ode_solve
from frankenstein.mixers.standard_attn import StandardAttention, softmax_dense
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.positions import Rotary

F64 = torch.float64
CASE = load_file(Path(__file__).parent / "ode_solve.safetensors")


def context(**values: object) -> MixerContext:
    shape = {"hidden_size": 16, "num_heads": 4, "retention_heads": 2, "max_length": 32}
    rest = {"dropout": 0.0, "causal": False, "layer_index": 0, "rotary": Rotary()}
    return MixerContext(**{**shape, **rest, **values})


def build(
    solver: str = "rk4", steps: int = 2, *, options: dict[str, float] | None = None, **values: object
) -> NeuralODEAttention:
    torch.manual_seed(0)
    layer = NeuralODEAttention(
        context(ode_solver=solver, ode_steps=steps, **values), NeuralODEAttention.Options(**(options or {}))
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def tokens() -> torch.Tensor:
    return torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(5), dtype=F64)


def solve(solver: str, steps: int, dtype: torch.dtype = F64) -> torch.Tensor:
    matrix = CASE["A"].to(dtype)
    return ode_solve(lambda t, z: z @ matrix.T, CASE["z0"].to(dtype), steps=steps, solver=solver)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-11)], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_linear_systems_have_their_exact_discrete_solution(
    solver: str, steps: int, dtype: torch.dtype, tolerance: float
) -> None:
    z = solve(solver, steps, dtype)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), CASE[f"expected_{solver}_{steps}"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("rk4", 4)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver: str, order: int) -> None:
    coarse, fine = ((solve(solver, steps) - CASE["expected_exact"]).norm() for steps in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_time_is_passed_on_and_cubics_are_integrated_exactly() -> None:
    zero = torch.zeros(1, dtype=F64)
    result = ode_solve(lambda t, z: torch.full_like(z, 4 * t**3), zero, steps=3, t0=1.0, t1=2.0)
    assert result.item() == pytest.approx(2.0**4 - 1)
    left = ode_solve(lambda t, z: torch.full_like(z, t), zero, steps=2, solver="euler", t0=1.0, t1=2.0)
    assert left.item() == pytest.approx((1.0 + 1.5) / 2)


def test_unknown_solvers_and_no_steps_are_refused() -> None:
    zero = torch.zeros(1)
    with pytest.raises(FrankensteinError, match="unknown solver 'heun'; known: rk4, euler"):
        ode_solve(lambda t, z: z, zero, steps=1, solver="heun")
    with pytest.raises(FrankensteinError, match="ode_steps: found 0; expected at least 1"):
        ode_solve(lambda t, z: z, zero, steps=0)
    with pytest.raises(FrankensteinError, match="unknown solver 'heun'"):
        build("heun")


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_one_euler_step_is_a_residual_attention_block(causal: bool) -> None:
    layer, x = build("euler", 1, causal=causal), tokens()
    attention = StandardAttention(context(causal=causal), StandardAttention.Options()).double()
    attention.load_state_dict({"project.linear.weight": layer.project.weight, "out.weight": layer.out.weight})
    torch.testing.assert_close(layer(x), attention(x))


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_the_weights_swing_with_time_as_in_the_seed(t: float) -> None:
    layer, z = build(), tokens()
    weight = layer.project.weight * (1 + layer.amplitude * (layer.frequency * t).sin())[:, None]
    q, k, v = (z @ weight.T).unflatten(-1, (3, 4, 4)).unbind(2)
    o = softmax_dense(layer.rotary(q), layer.rotary(k), v)
    torch.testing.assert_close(layer.dynamics(t, z), layer.out(o.flatten(2)))


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("values", [{}, {"num_kv_heads": 2}, {"rotary": None, "scores": Hope()}], ids=str)
def test_the_layer_is_the_change_over_the_unit_of_time(solver: str, values: dict[str, object]) -> None:
    layer, x = build(solver, 3, **values), tokens()
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    end = ode_solve(lambda t, z: layer.dynamics(t, z, mask), x, steps=3, solver=solver)
    torch.testing.assert_close(layer(x, mask), end - x)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_penalty_is_the_mean_squared_length_of_f_where_steps_start(padded: bool) -> None:
    layer, x = build(options={"penalty": 0.5}), tokens()
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]]) if padded else torch.ones(2, 7, dtype=torch.bool)
    layer(x, mask if padded else None)
    half = ode_solve(lambda t, z: layer.dynamics(t, z, mask), x, steps=1, t1=0.5)
    starts = (layer.dynamics(0.0, x, mask), layer.dynamics(0.5, half, mask))
    expected = 0.5 * sum(f[mask].square().sum(-1).mean() for f in starts) / 2
    torch.testing.assert_close(layer.losses()["ode"], expected)


def test_the_penalty_belongs_to_training_only_and_can_be_left_out() -> None:
    layer, x = build(), tokens()
    assert layer.losses() == {}
    layer(x)
    assert set(layer.losses()) == {"ode"}
    layer.eval()(x)
    assert layer.losses() == {}
    free = build(options={"penalty": 0.0})
    free(x)
    assert free.losses() == {}


def test_a_layer_can_be_copied_after_a_training_step() -> None:
    layer, x = build(), tokens()
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.losses() == {} and set(layer.losses()) == {"ode"}
    assert torch.equal(twin(x), layer(x))


def test_losses_of_all_traversals_add_up_and_survive_recomputation() -> None:
    values, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        options = ModelOptions(
            vocab_size=40,
            hidden_size=16,
            num_layers=2,
            num_loops=2,
            layer_pattern=("ode", "standard_attn"),
            ffn_hidden_size=8,
            gradient_checkpointing=checkpointing,
        )
        encoder = Encoder(options, max_length=32)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        first: list[torch.Tensor] = []
        layer = encoder.blocks[0].mixer
        layer.register_forward_hook(lambda module, *_, first=first: first.append(module.losses()["ode"]))
        encoder(torch.arange(5, 12)[None])
        (loss,) = encoder.losses().values()
        torch.testing.assert_close(loss, first[0] + first[1])
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, layer.parameters()))
    assert torch.equal(*values)
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(stored, recomputed)
        assert stored.abs().max() > 0
