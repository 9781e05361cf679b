"""Griffin's RG-LRU. Frozen numbers: google-deepmind/recurrentgemma@2efa84d, recurrentgemma/torch/layers.py, class RGLRU
in float64 with given gate logits and no document start (rg_lru.safetensors), and both directions by y = f(x) +
flip(f(flip x)) - f1(x), every row without its padding (bidirectional_rg_lru.safetensors).
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.griffin import (
    GriffinRecurrentBlock,
    bidirectional_rg_lru,
    bidirectional_rg_lru_recurrent,
    linear_scan,
    rg_lru,
    rg_lru_recurrent,
)

F64 = torch.float64
ONE_WAY = "x a_gate input_gate a_param"
BOTH = ONE_WAY + " a_gate_rev input_gate_rev a_param_rev"


def random_inputs(length: int, names: str = ONE_WAY) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {n: (6,) if n.startswith("a_param") else (2, length, 6) for n in names.split()}
    return {n: torch.randn(*s, generator=generator, dtype=F64).requires_grad_() for n, s in shapes.items()}


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 8, 64, 65, 150])
def test_the_scan_equals_the_recurrence_with_states_and_gradients(length: int) -> None:
    results = []
    for function in (rg_lru, rg_lru_recurrent):
        inputs = random_inputs(length)
        state = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
        o, final = function(**inputs, initial_state=state, output_final_state=True)
        grads = torch.autograd.grad(o.sin().sum() + final.cos().sum(), (*inputs.values(), state))
        results.append((o, final, *grads))
    assert_same(results)


@pytest.mark.parametrize("length", [1, 9, 70])
@pytest.mark.parametrize("names", [ONE_WAY, BOTH, ONE_WAY + " a_gate_rev", ONE_WAY + " a_param_rev"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_bidirectional_equals_the_rule_with_gradients(length: int, names: str, padded: bool) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]]) if padded else None
    results = []
    for function in (bidirectional_rg_lru, bidirectional_rg_lru_recurrent):
        inputs = random_inputs(length, names)
        o = function(**inputs, mask=mask)
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    assert_same(results)


def test_without_states_the_final_state_is_none_and_two_halves_make_a_whole() -> None:
    inputs = random_inputs(45)
    whole, nothing = rg_lru(**inputs)
    assert nothing is None
    first, second = (
        {n: v if v.dim() == 1 else v[:, part] for n, v in inputs.items()} for part in (slice(10), slice(10, 45))
    )
    begin, state = rg_lru(**first, output_final_state=True)
    torch.testing.assert_close(torch.cat([begin, rg_lru(**second, initial_state=state)[0]], 1), whole)


def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient() -> None:
    inputs = random_inputs(12, BOTH)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_rg_lru(**inputs, mask=mask)
    alone = bidirectional_rg_lru(**{n: v if v.dim() == 1 else v[1:, :7] for n, v in inputs.items()})
    torch.testing.assert_close(o[1:, :7], alone)
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), [v for v in inputs.values() if v.dim() == 3]):
        assert grad[1, 7:].abs().max() == 0


def test_reversing_the_input_reverses_the_output() -> None:
    inputs = random_inputs(37)
    flipped = {n: v if v.dim() == 1 else v.flip(1) for n, v in inputs.items()}
    torch.testing.assert_close(bidirectional_rg_lru(**flipped).flip(1), bidirectional_rg_lru(**inputs))


def test_one_token_gives_the_causal_output() -> None:
    inputs = random_inputs(1)
    torch.testing.assert_close(bidirectional_rg_lru(**inputs), rg_lru(**inputs)[0])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_with_a_constant_decay_is_a_geometric_sum(reverse: bool) -> None:
    ones = torch.ones(1, 100, 1, dtype=F64)
    h = linear_scan(0.5 * ones, ones, reverse=reverse)[0, :, 0]
    expected = 2 - 0.5 ** torch.arange(100, dtype=F64)
    torch.testing.assert_close(h.flip(0) if reverse else h, expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("strength", [-3.0, -900.0, 900.0, 0.0])
def test_extreme_decays_over_many_steps_stay_finite_and_right(dtype: torch.dtype, strength: float) -> None:
    """Log decays of -3 a step; gates that are all closed (a = 1, nothing is written) and all open (a = 0)."""
    inputs = {n: v.detach().to(dtype) for n, v in random_inputs(130).items()}
    if strength == -3.0:
        inputs["a_param"] = torch.full((6,), 0.4, dtype=dtype)
        inputs["a_gate"] = torch.full((2, 130, 6), 0.0, dtype=dtype)
    else:
        inputs["a_gate"] = torch.full((2, 130, 6), strength, dtype=dtype)
        inputs["a_param"] = torch.full((6,), abs(strength), dtype=dtype)
    inputs = {n: v.requires_grad_() for n, v in inputs.items()}
    fast, plain = rg_lru(**inputs)[0], rg_lru_recurrent(**inputs)[0]
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert fast.dtype == dtype
    total = fast.sum() + bidirectional_rg_lru(**inputs).sum()
    for grad in torch.autograd.grad(total, tuple(inputs.values())):
        assert torch.isfinite(grad).all()


def test_slow_decays_are_written_without_cancellation() -> None:
    """1 - a^2 in float32 would be off by several percent here."""
    inputs = {n: v.detach().float() for n, v in random_inputs(5).items()}
    inputs["a_param"] = torch.full((6,), -15.0)
    exact = rg_lru_recurrent(**{n: v.double() for n, v in inputs.items()})[0]
    torch.testing.assert_close(rg_lru(**inputs)[0].double(), exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["rg_lru", "bidirectional_rg_lru"])
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    inputs = {k: v for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    inputs = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    if name == "rg_lru":
        outputs = dict(zip(("o", "final_state"), rg_lru(**inputs, output_final_state=True), strict=True))
    else:
        outputs = {"o": bidirectional_rg_lru(**inputs)}
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for key, value in outputs.items():
        torch.testing.assert_close(value.double(), case[f"expected_{key}"], **tolerance)
    sum((value * case[f"w_{key}"].to(dtype)).sum() for key, value in outputs.items()).backward()
    checked = [key for key in inputs if key != "mask"]
    assert len(checked) >= 5
    for key in checked:
        torch.testing.assert_close(inputs[key].grad.double(), case[f"expected_grad_{key}"], **tolerance)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_follows_the_authors_block(separate: bool, causal: bool) -> None:
    torch.manual_seed(0)
    options = GriffinRecurrentBlock.Options(expand=1.5, separate_gates=separate)
    mixer = GriffinRecurrentBlock(MixerContext(8, 2, 2, 0.0, causal, 16, 0, None), options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 9, 8, dtype=F64)
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    inner, gelu = mixer.project(x).split(12, -1)
    inner = mixer.conv(inner, mask)
    logits = []
    for kind in range(2 + 2 * (separate and not causal)):
        blocks = [inner[..., 6 * h : 6 * h + 6] @ mixer.gate_weight[h][:, 6 * kind : 6 * kind + 6] for h in range(2)]
        logits.append(torch.cat(blocks, -1) + mixer.gate_bias[kind])
    if causal:
        h = rg_lru_recurrent(inner, *logits, mixer.a_param[0])[0]
    else:
        back = dict(zip(("a_gate_rev", "input_gate_rev"), logits[2:], strict=False))
        h = bidirectional_rg_lru_recurrent(
            inner, *logits[:2], mixer.a_param[0], **back, a_param_rev=mixer.a_param[-1], mask=mask
        )
    expected = mixer.out(h * F.gelu(gelu, approximate="tanh"))
    torch.testing.assert_close(mixer(x, mask)[mask], expected[mask])


def test_a_fresh_layer_keeps_between_90_and_999_thousandths_at_least() -> None:
    torch.manual_seed(0)
    mixer = GriffinRecurrentBlock(MixerContext(400, 4, 2, 0.0, False, 16, 0, None), GriffinRecurrentBlock.Options())
    strongest = (-8 * F.softplus(mixer.a_param)).exp()
    assert strongest.shape == (2, 400)
    assert 0.8999 < strongest.min() < 0.905 and 0.995 < strongest.max() < 0.9991
    assert not torch.equal(strongest[0], strongest[1])


def test_widths_that_do_not_fit_the_heads_are_refused_by_name() -> None:
    context = MixerContext(16, 4, 2, 0.0, False, 16, 0, None)
    message = r"model.mixers.griffin.expand=0.9 makes 14 channels of hidden_size=16; expected a multiple of num_heads=4"
    with pytest.raises(FrankensteinError, match=message):
        GriffinRecurrentBlock(context, GriffinRecurrentBlock.Options(expand=0.9))
