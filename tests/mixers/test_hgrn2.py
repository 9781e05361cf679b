"""HGRN2. Frozen numbers: fla-org/flash-linear-attention@bc3b101 in float64, one head of the gate lines of
fla/layers/hgrn2.py with naive_recurrent_gla (hgrn2.safetensors; bidirectional_hgrn2.safetensors by y = f(x) +
flip(f(flip x)) - f1(x)), and the bounds of fla/models/hgrn2/modeling_hgrn2.py (hgrn2_lower_bounds.safetensors). The
loss of hgrn2.safetensors also weighs g = log a and k = 1 - a.
"""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.gla import gla_recurrent
from frankenstein.mixers.hgrn2 import (
    HGRN2,
    bidirectional_hgrn2,
    bidirectional_hgrn2_recurrent,
    hgrn2,
    hgrn2_lower_bounds,
    hgrn2_recurrent,
)
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.quantization.convert import convert_to_bitlinear

F64 = torch.float64
SHAPES = {"q": (3, 4), "f": (3, 4), "v": (3, 5), "f_rev": (3, 4)}


def random_inputs(length: int, names: str = "q f v", batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {n: (batch, length, *SHAPES[n]) for n in names.split()}
    return {n: torch.randn(*s, generator=generator, dtype=F64).mul(2).requires_grad_() for n, s in shapes.items()}


def random_bound() -> torch.Tensor:
    return torch.rand(3, 4, generator=torch.Generator().manual_seed(5), dtype=F64).requires_grad_()


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 33, 70])
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("bounded", [False, True])
def test_chunked_equals_recurrent_with_states_and_gradients(length: int, chunk_size: int, bounded: bool) -> None:
    results = []
    for function, extra in ((hgrn2, {"chunk_size": chunk_size}), (hgrn2_recurrent, {})):
        inputs = random_inputs(length)
        if bounded:
            inputs["lower_bound"] = random_bound()
        state = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
        o, final = function(**inputs, initial_state=state, output_final_state=True, scale=0.7, **extra)
        grads = torch.autograd.grad(o.sin().sum() + final.cos().sum(), (*inputs.values(), state))
        results.append((o, final, *grads))
    assert_same(results)


@pytest.mark.parametrize("length", [1, 9, 70])
@pytest.mark.parametrize("names", ["q f v", "q f v f_rev"], ids=["shared", "own"])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_bidirectional_equals_the_rule_with_gradients(length: int, names: str, bounded: bool, padded: bool) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]]) if padded else None
    results = []
    for function, extra in ((bidirectional_hgrn2, {"chunk_size": 16}), (bidirectional_hgrn2_recurrent, {})):
        inputs = random_inputs(length, names)
        if bounded:
            inputs["lower_bound"] = random_bound()
        o = function(**inputs, mask=mask, **extra)
        results.append((o, *torch.autograd.grad(o.sin().sum(), tuple(inputs.values()))))
    assert_same(results)


def test_padded_rows_touch_no_gradient_and_come_out_as_zero() -> None:
    inputs = random_inputs(12, "q f v f_rev")
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_hgrn2(**inputs, mask=mask)
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), tuple(inputs.values())):
        assert grad[1, 7:].abs().max() == 0


def test_reversing_the_input_reverses_the_output() -> None:
    inputs = random_inputs(37)
    o = bidirectional_hgrn2(**inputs, chunk_size=8)
    torch.testing.assert_close(bidirectional_hgrn2(**{n: x.flip(1) for n, x in inputs.items()}).flip(1), o)


def test_a_bound_of_one_leaves_the_state_as_it_was_and_a_bound_of_zero_is_none() -> None:
    inputs = random_inputs(9)
    state = torch.randn(2, 3, 4, 5, dtype=F64)
    _, kept = hgrn2(**inputs, lower_bound=torch.ones(3, 4, dtype=F64), initial_state=state, output_final_state=True)
    torch.testing.assert_close(kept, state)
    zero = hgrn2(**inputs, lower_bound=torch.zeros(3, 4, dtype=F64))[0]
    torch.testing.assert_close(zero, hgrn2(**inputs)[0])


def test_the_key_is_tied_to_the_forget_gate() -> None:
    q, f, v = random_inputs(20).values()
    tied = gla_recurrent(q * q.sigmoid(), 1 - f.sigmoid(), v, f.sigmoid().log())[0]
    torch.testing.assert_close(hgrn2(q, f, v)[0], tied)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("logit", [-3.0, -200.0, 200.0])
@pytest.mark.parametrize("bounded", [False, True])
def test_extreme_gates_over_many_steps_stay_finite_and_right(dtype: torch.dtype, logit: float, bounded: bool) -> None:
    inputs = {n: x.detach().to(dtype) for n, x in random_inputs(130).items()}
    inputs["f"] = torch.full_like(inputs["f"], logit)
    if bounded:
        inputs["lower_bound"] = torch.tensor([0.0, 0.5, 0.9], dtype=dtype)[:, None].repeat(1, 4)
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    o = hgrn2(**inputs)[0] + bidirectional_hgrn2(**inputs)
    plain = hgrn2_recurrent(**inputs)[0] + bidirectional_hgrn2_recurrent(**inputs)
    torch.testing.assert_close(o, plain, rtol=1e-4, atol=1e-5)
    assert o.dtype == dtype
    for grad in torch.autograd.grad(o.sum(), tuple(inputs.values())):
        assert torch.isfinite(grad).all()


def test_bounds_start_at_zero_and_grow_to_less_than_one() -> None:
    param = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    bounds = hgrn2_lower_bounds(param)
    assert bounds[0].abs().max() == 0 and (bounds.diff(dim=0) > 0).all() and bounds.max() < 1
    torch.testing.assert_close(hgrn2_lower_bounds(torch.zeros(4, 1))[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75]))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["hgrn2", "bidirectional_hgrn2", "hgrn2_lower_bounds"])
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    inputs = {k: v for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    inputs = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    if name == "hgrn2":
        outputs = dict(zip(("o", "final_state"), hgrn2(**inputs, output_final_state=True), strict=True))
        bound = inputs["lower_bound"]
        a = bound + (1 - bound) * inputs["f"].sigmoid()
        outputs |= {"g": a.log(), "k": 1 - a}
    else:
        outputs = {
            "o": {"bidirectional_hgrn2": bidirectional_hgrn2, "hgrn2_lower_bounds": hgrn2_lower_bounds}[name](**inputs)
        }
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for key, value in outputs.items():
        torch.testing.assert_close(value.double(), case[f"expected_{key}"], **tolerance)
    sum((value * case[f"w_{key}"].to(dtype)).sum() for key, value in outputs.items()).backward()
    checked = [key for key in inputs if key != "mask"]
    assert checked
    for key in checked:
        torch.testing.assert_close(inputs[key].grad.double(), case[f"expected_grad_{key}"], **tolerance)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("conv_size", [0, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_follows_the_authors_equation(separate: bool, conv_size: int, causal: bool) -> None:
    torch.manual_seed(0)
    options = HGRN2.Options(expand_ratio=3, separate_gates=separate, conv_size=conv_size)
    mixer = HGRN2(MixerContext(8, 2, 2, 0.0, causal, 16, 0, None), options).double()
    torch.nn.init.normal_(mixer.norm.weight)
    x = torch.randn(2, 7, 8, dtype=F64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    mixed = mixer.project(x)
    if conv_size:
        mixed = mixer.conv(mixed, mask)
    v, q, f, *own = mixed.split((8, 6, 6, 6)[: 3 + (separate and not causal)], -1)
    v, q, f, reverse = (part.view(2, 7, 2, -1) for part in (v, q, f, own[0] if own else f))
    plain = (
        hgrn2_recurrent(q, f, v)[0] if causal else bidirectional_hgrn2_recurrent(q, f, v, f_rev=reverse, mask=mask)
    ).flatten(2)
    plain = plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(x, mask)[mask], mixer.out(plain)[mask])


def encoder() -> Encoder:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=50, hidden_size=16, num_layers=6, layer_pattern=("hgrn2_attn", "standard_attn"), ffn_hidden_size=8
    )
    model = Encoder(options, max_length=32)
    torch.nn.init.normal_(model.blocks[0].mixer.bounds)
    return model.eval()


def test_the_first_layer_owns_the_bounds_of_all_layers_of_an_encoder() -> None:
    model = encoder()
    owned = {name: p for name, p in model.named_parameters() if name.endswith("bounds")}
    assert list(owned) == ["blocks.0.mixer.bounds"]
    parameter = owned["blocks.0.mixer.bounds"]
    assert parameter.shape == (3, 16)
    layers = [model.blocks[i].mixer for i in (0, 2, 4)]
    assert layers[0].lower_bound() is None
    expected = hgrn2_lower_bounds(parameter)
    for row, layer in enumerate(layers[1:], 1):
        assert torch.equal(layer.lower_bound().flatten(), expected[row])
    model(torch.arange(5, 12)[None]).sin().sum().backward()
    assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


def test_a_single_layer_has_no_bounds() -> None:
    mixer = HGRN2(MixerContext(16, 4, 2, 0.0, False, 32, 0, None), HGRN2.Options())
    assert mixer.lower_bound() is None and "bounds" not in dict(mixer.named_parameters())


def test_bounds_survive_copies_state_dicts_files_and_ternary_conversion(tmp_path: Path) -> None:
    model, ids = encoder(), torch.arange(5, 12)[None]
    before = model(ids)
    twin = copy.deepcopy(model)
    torch.nn.init.normal_(model.blocks[0].mixer.bounds, std=9.0)
    assert not torch.equal(model(ids), before)
    assert torch.equal(twin(ids), before)
    assert twin.blocks[4].mixer.first[0] is twin.blocks[0].mixer

    save_file(twin.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(ids), before)

    ternary = convert_to_bitlinear(model)
    low = ternary(ids)
    torch.nn.init.normal_(ternary.blocks[0].mixer.bounds, std=9.0)
    assert not torch.equal(ternary(ids), low)
