"""Norms against published code and torch.

<name>.safetensors: inputs in float32, outputs and gradients computed in float64 for the loss sum(w_y * y), by torch
2.13 rms_norm, jiachenzhu/DyT@aab5dde DynamicTanh and zlab-princeton/Derf@8dd9ea3 Dynamic_erf.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.model.norms import NORMS, derf, dyt, rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", [rms_norm, dyt, derf], ids=lambda f: f.__name__)
def test_values_and_gradients_equal_published_code(function, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{function.__name__}.safetensors")
    inputs = {k: v.to(dtype).requires_grad_() for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    tolerance = {"rtol": 1e-4, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    y = function(**inputs)
    torch.testing.assert_close(y.double(), case["expected_y"], **tolerance)
    (y * case["w_y"].to(dtype)).sum().backward()
    for name, x in inputs.items():
        torch.testing.assert_close(x.grad.double(), case[f"expected_grad_{name}"], **tolerance)


def test_fresh_layers_are_the_published_start() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(NORMS["dynamic_tanh"](16)(x), (x / 2).tanh())
    torch.testing.assert_close(NORMS["derf"](16)(x), (x / 2).erf())
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(
        NORMS["layer_norm"](16)(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    )
    torch.testing.assert_close(NORMS["rms_norm"](16)(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert NORMS["derf"](16)(torch.full((1, 16), 2.0))[0, 0].item() == pytest.approx(math.erf(1.0))


@pytest.mark.parametrize("name", list(NORMS))
def test_every_norm_trains_and_keeps_the_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        norm = NORMS[name](8).to(dtype)
        x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
        y = norm(x)
        assert y.dtype == dtype and y.shape == x.shape
        y.sin().sum().backward()
        for parameter in (x, *norm.parameters()):
            assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


def test_the_contract_names_are_there() -> None:
    assert set(NORMS) >= {"layer_norm", "rms_norm", "dynamic_tanh", "derf"}
