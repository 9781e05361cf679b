"""Operators against numbers of published code, frozen as <operator>.safetensors beside this file.

Inputs are float32; `expected_<output>` and `expected_grad_<input>` were computed in float64, the gradients for the loss
sum(w_o * o). Made with: torch 2.13 scaled_dot_product_attention (softmax_attention, gated_softmax_attention);
apple/ml-sigmoid-attention@9273b49 attention_ref (sigmoid_attention); fla-org/flash-linear-attention@bc3b101
naive_retention (retention, and bidirectional_retention by y = f(x) + flip(f(flip x)) - f1(x)).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.mixers.gated_softmax_attn import gated_softmax_attention
from frankenstein.mixers.retnet import bidirectional_retention, retention, retention_decay
from frankenstein.mixers.sigmoid_attn import sigmoid_attention
from frankenstein.mixers.standard_attn import softmax_attention

TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float64: (1e-9, 1e-9)}
OPERATORS = {
    "softmax_attention": softmax_attention,
    "gated_softmax_attention": gated_softmax_attention,
    "sigmoid_attention": sigmoid_attention,
    "retention": lambda **x: retention(**x, log_gamma=retention_decay(4).log())[0],
    "bidirectional_retention": bidirectional_retention,
}
EXTRA = {"sigmoid_attention": {"bias": -1.9459101490553132}}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    inputs = {k: v for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    inputs = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    o = OPERATORS[name](**inputs, **EXTRA.get(name, {}))
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(o.double(), case["expected_o"], rtol=rtol, atol=atol)
    assert o.dtype == dtype
    (o * case["w_o"].to(dtype)).sum().backward()
    checked = [k for k in inputs if f"expected_grad_{k}" in case]
    assert {"q", "k", "v"} <= set(checked)
    for k in checked:
        torch.testing.assert_close(inputs[k].grad.double(), case[f"expected_grad_{k}"], rtol=rtol, atol=atol)
