import pytest
import torch

from frankenstein.mixers.gated_softmax_attn import gated_softmax_attention, gated_softmax_dense
from frankenstein.mixers.standard_attn import softmax_attention


def random_inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 11, 3, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4)]


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_fused_equals_dense_with_gradients(causal: bool) -> None:
    mask = torch.arange(11)[None] < torch.tensor([[11], [5]])
    results = []
    for function in (gated_softmax_attention, gated_softmax_dense):
        inputs = random_inputs()
        o = function(*inputs, key_padding_mask=mask, causal=causal)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_an_open_gate_leaves_softmax_attention_and_a_closed_one_nothing() -> None:
    q, k, v, _ = random_inputs()
    plain = softmax_attention(q, k, v)
    torch.testing.assert_close(gated_softmax_attention(q, k, v, torch.full_like(v, 40.0)), plain)
    torch.testing.assert_close(gated_softmax_attention(q, k, v, torch.zeros_like(v)), plain / 2)
    assert gated_softmax_attention(q, k, v, torch.full_like(v, -800.0)).abs().max() == 0
